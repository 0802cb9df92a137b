// Implements encode_rows.h.
#include "bind/encode_rows.h"

#include <algorithm>
#include <cstdint>
#include <optional>

#include "bind/call_reader.h"
#include "common/dtype.h"
#include "common/work.h"

namespace jax_ep {
namespace {

std::optional<Float8> Float8Of(ffi::DataType type) {
  if (type == ffi::DataType::F8E4M3FN) return Float8::kE4M3;
  if (type == ffi::DataType::F8E5M2) return Float8::kE5M2;
  return std::nullopt;
}

}  // namespace

EncodeRowsArgs ReadEncodeRows(BufferReader& reader) {
  const Tensor x = reader.Operand("x", 1);
  const Tensor rows = reader.Result("rows", 1);
  const Tensor scales = reader.Result("scales", 1);
  const std::int64_t block = reader.Attribute("block");
  const bool power_of_two = reader.Attribute("power_of_two") != 0;
  const auto dtype = KernelDType(x.type);
  const auto to = Float8Of(rows.type);
  reader.Require(dtype.has_value() && *dtype != DType::kF64, "x of floats");
  reader.Require(to.has_value(), "rows of floats of 8 bits");
  reader.Require(block > 0, "blocks of one element at least");
  if (reader.failed()) return {};
  const std::int64_t hidden = x.dim(0);
  const std::int64_t num_rows = x.elements() / std::max<std::int64_t>(hidden, 1);
  const std::int64_t num_blocks = CeilDiv(hidden, block);
  reader.Require(rows.dim(0) == hidden && rows.elements() == x.elements(), "rows as x");
  reader.Require(
      scales.type == ffi::DataType::F32 && scales.elements() == num_rows * num_blocks,
      "scales");
  return {.x = x.data,
          .rows = static_cast<std::uint8_t*>(rows.data),
          .scales = static_cast<float*>(scales.data),
          .num_rows = num_rows,
          .hidden = hidden,
          .block = block,
          .num_blocks = num_blocks,
          .dtype = *dtype,
          .to = *to,
          .power_of_two = power_of_two};
}

}  // namespace jax_ep
