// The handlers of a rank's part of a plan that no rank makes alone. Nobody waits here.
#include "cpu/own_choices.h"

#include <algorithm>
#include <cstdint>

#include "bind/call_reader.h"
#include "bind/handler_list.h"
#include "common/dropped.h"

namespace jax_ep {
namespace {

struct CountCall {
  cpu::OwnChoices choices;
  cpu::ChoiceCounts counts;
};

struct PlaceCall {
  cpu::OwnChoices choices;
  const std::int32_t* first_rows;
  cpu::PlacedChoices placed;
};

// Checks that no choice names an expert that there is not: kernels index by them.
bool AreSound(const cpu::OwnChoices& choices) {
  const std::int64_t count = choices.num_tokens * choices.num_topk;
  return std::all_of(choices.topk_idx, choices.topk_idx + count, [&](std::int32_t e) {
    return e == kDropped || (e >= 0 && e < choices.num_experts);
  });
}

// What both are told first.
cpu::OwnChoices ReadChoices(BufferReader& reader) {
  cpu::OwnChoices choices = {};
  choices.num_ranks = reader.Attribute("num_ranks");
  choices.num_experts = reader.Attribute("num_experts");
  choices.num_tokens = reader.Attribute("num_tokens");
  choices.num_topk = reader.Attribute("num_topk");
  const auto* rank = reader.Operand<std::int32_t>("rank", 1);
  choices.topk_idx =
      reader.Operand<std::int32_t>("topk_idx", choices.num_tokens * choices.num_topk);
  choices.cutoffs = reader.Operand<std::int32_t>("cutoffs", choices.num_ranks);
  reader.Require(choices.num_ranks > 0 && choices.num_experts % choices.num_ranks == 0,
                 "as many experts on each rank");
  if (!reader.failed() && rank != nullptr) choices.rank = *rank;
  return choices;
}

CountCall ReadCount(BufferReader& reader) {
  CountCall call = {.choices = ReadChoices(reader), .counts = {}};
  const cpu::OwnChoices& choices = call.choices;
  call.counts = {.kept = reader.Result<std::int32_t>("kept", choices.num_experts),
                 .asked_by_k = reader.Result<std::int32_t>(
                     "asked_by_k", choices.num_ranks * choices.num_topk),
                 .fingerprint = reader.Result<std::uint32_t>("fingerprint", 1)};
  return call;
}

PlaceCall ReadPlace(BufferReader& reader) {
  PlaceCall call = {
      .choices = ReadChoices(reader), .first_rows = nullptr, .placed = {}};
  const std::int64_t count = call.choices.num_tokens * call.choices.num_topk;
  call.first_rows =
      reader.Operand<std::int32_t>("first_rows", call.choices.num_experts);
  call.placed = {.kept = reader.Result<bool>("kept", count),
                 .send_rank = reader.Result<std::int32_t>("send_rank", count),
                 .send_row = reader.Result<std::int32_t>("send_row", count),
                 .place = reader.Result<std::int32_t>("place", count),
                 .num_dropped = reader.Result<std::int32_t>("num_dropped", 1)};
  return call;
}

ffi::Error CountChoices(ffi::RemainingArgs operands, ffi::RemainingRets results,
                        ffi::Dictionary attributes) {
  BufferReader reader(operands, results, attributes);
  const CountCall call = ReadCount(reader);
  if (!reader.failed()) reader.Require(AreSound(call.choices), "choices of experts");
  if (reader.failed()) return reader.error();
  cpu::CountChoices(call.choices, call.counts);
  return ffi::Error::Success();
}

ffi::Error PlaceChoices(ffi::RemainingArgs operands, ffi::RemainingRets results,
                        ffi::Dictionary attributes) {
  BufferReader reader(operands, results, attributes);
  const PlaceCall call = ReadPlace(reader);
  if (!reader.failed()) reader.Require(AreSound(call.choices), "choices of experts");
  if (reader.failed()) return reader.error();
  cpu::PlaceChoices(call.choices, call.first_rows, call.placed);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_ep

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_ep_count_choices, jax_ep::CountChoices,
    xla::ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_ep_place_choices, jax_ep::PlaceChoices,
    xla::ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs());

EP_LIST_HANDLER(count_choices, jax_ep::ReadCount, {"execute", "jax_ep_count_choices"})
EP_LIST_HANDLER(place_choices, jax_ep::ReadPlace, {"execute", "jax_ep_place_choices"})
