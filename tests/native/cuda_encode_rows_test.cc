// The emulated kernel that encodes rows, against what a search among all numbers finds.
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "cuda/encode_rows.h"
#include "cuda_launches.h"
#include "encoding.h"
#include "numbers.h"

namespace jax_ep {
namespace {

EP_TEST(RowsAreEncoded) {
  std::mt19937_64 rng(1);
  ForEncodings(rng, [&](const Numbers& x, EncodeRowsArgs args) {
    emulation::SetSeed(rng());
    const EncodedRows want = ReferenceEncoding(x, args);
    Output<std::uint8_t> rows(x.size(), rng);
    Output<float> scales(args.num_rows * args.num_blocks, rng);
    args.rows = rows.data();
    args.scales = scales.data();
    if (!EP_CHECK_RAN(cuda::EncodeRows(args, nullptr))) return;
    EP_CHECK_EQ(std::vector<std::uint8_t>(rows.data(), rows.data() + rows.size()),
                want.rows);
    EP_CHECK_EQ(std::vector<float>(scales.data(), scales.data() + scales.size()),
                want.scales);
    EP_CHECK(rows.IsIntactBehind());
    EP_CHECK(scales.IsIntactBehind());
  });
}

EP_TEST(NoRowsAreNoLaunch) {
  EncodeRowsArgs args = ArgsOf(0, 128, 128);
  EP_CHECK_RAN(cuda::EncodeRows(args, nullptr));
  args = ArgsOf(3, 0, 128);
  EP_CHECK_RAN(cuda::EncodeRows(args, nullptr));
}

EP_TEST(Float64IsRefused) {
  EncodeRowsArgs args = ArgsOf(1, 1, 1);
  args.dtype = DType::kF64;
  EP_CHECK(cuda::EncodeRows(args, nullptr) == cudaErrorInvalidValue);
}

}  // namespace
}  // namespace jax_ep
