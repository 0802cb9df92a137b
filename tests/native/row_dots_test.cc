// The kernel for CPUs of rows' products, against products taken one by one.
#include "cpu/row_dots.h"

#include <bit>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "common/dropped.h"
#include "numbers.h"
#include "run_work.h"
#include "token_rows.h"

namespace jax_ep {
namespace {

void CheckDots(const Geometry& geometry, DType dtype, std::int64_t hidden,
               Routing routing, std::mt19937_64& rng) {
  const Case which(std::string(Name(dtype)) + " H=" + Show(hidden) + " " +
                   geometry.Text());
  const TokenRows tokens(geometry, routing, dtype, hidden, rng);
  Numbers dout(dtype, geometry.num_tokens * hidden);
  dout.FillRandomly(rng);
  std::vector<float> dots(tokens.send_row.size(), 7);
  const RowDotsArgs args = {.rows = PeerTable(tokens.table.data()),
                            .dout = dout.at(0),
                            .send_rank = tokens.send_rank.data(),
                            .send_row = tokens.send_row.data(),
                            .dots = dots.data(),
                            .num_ranks = geometry.num_ranks,
                            .num_tokens = geometry.num_tokens,
                            .num_topk = geometry.num_topk,
                            .capacity = geometry.capacity,
                            .hidden = hidden,
                            .dtype = dtype};
  const Work work = cpu::RowDotsWork(args);
  if (rng() % 2 == 0) {
    RunShuffled(work, rng);
  } else {
    RunAtOnce(work);
  }
  for (std::size_t choice = 0; choice < dots.size(); ++choice) {
    const auto token = static_cast<std::int64_t>(choice) / geometry.num_topk;
    const bool dropped = tokens.send_row[choice] == kDropped;
    const float want =
        dropped ? 0.0F
                : ReferenceDot(tokens.rows[tokens.RankOf(choice)],
                               tokens.RowStart(choice), dout, token * hidden, hidden);
    EP_CHECK_EQ(std::bit_cast<std::uint32_t>(dots[choice]),
                std::bit_cast<std::uint32_t>(want));
  }
}

EP_TEST(DotsOfKeptChoicesAndZerosOfDropped) {
  std::mt19937_64 rng(1);
  for (const DType dtype : kAllDTypes) {
    for (const std::int64_t hidden : {0, 1, 63, 200}) {
      for (const Routing routing : kAllRoutings) {
        for (const std::int64_t capacity : {8, 120}) {
          CheckDots({.num_ranks = 3,
                     .num_local_experts = 2,
                     .num_tokens = 20,
                     .num_topk = 4,
                     .capacity = capacity,
                     .alignment = 4},
                    dtype, hidden, routing, rng);
        }
      }
    }
  }
}

EP_TEST(DotsRunInManyChunks) {
  std::mt19937_64 rng(2);
  for (int i = 0; i < 4; ++i) {
    CheckDots({.num_ranks = 2,
               .num_local_experts = 2,
               .num_tokens = 25,
               .num_topk = 3,
               .capacity = 50},
              DType::kF32, 6000, Routing::kHoles, rng);
  }
}

}  // namespace
}  // namespace jax_ep
