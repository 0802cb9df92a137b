// Implements call_reader.h.
#include "bind/call_reader.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace jax_ep {
namespace {

// The attributes of a call are gone when its handler has returned; what is known of it
// later, by errors and by peers, points to these. There are a handful.
const char* Interned(std::string_view text) {
  static std::mutex mutex;
  static auto* texts = new std::set<std::string, std::less<>>();
  const std::scoped_lock lock(mutex);
  return texts->emplace(text).first->c_str();
}

constexpr XLA_FFI_Args kNoArgs = {};
constexpr XLA_FFI_Rets kNoRets = {};
constexpr std::array<std::int64_t, 2> kOnes = {1, 1};

// What a reader that reads no call finds everywhere: of a type that kernels know.
Tensor OneElement() {
  return {.data = nullptr,
          .type = ffi::DataType::F32,
          .dims = {kOnes.data(), kOnes.size()}};
}

}  // namespace

std::optional<DType> KernelDType(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::BF16:
      return DType::kBF16;
    case ffi::DataType::F16:
      return DType::kF16;
    case ffi::DataType::F32:
      return DType::kF32;
    case ffi::DataType::F64:
      return DType::kF64;
    default:
      return std::nullopt;
  }
}

std::int64_t Tensor::elements() const {
  std::int64_t product = 1;
  for (const std::int64_t dim : dims) product *= dim;
  return product;
}

BufferReader::BufferReader(Signature& asked)
    : operands_(&kNoArgs, 0),
      results_(&kNoRets, 0),
      attributes_(nullptr),
      asked_(&asked) {}

std::int64_t BufferReader::Attribute(const char* name) {
  if (asked_ != nullptr) {
    asked_->attributes.insert(name);
    return 1;
  }
  const auto value = attributes_.get<std::int64_t>(name);
  if (value.has_value()) return *value;
  Require(false, name);
  return 1;
}

std::span<const std::int64_t> BufferReader::List(const char* name) {
  if (asked_ != nullptr) {
    asked_->attributes.insert(name);
    return {};
  }
  const auto value = attributes_.get<ffi::Span<const std::int64_t>>(name);
  if (!value.has_value()) return {};
  return {value->begin(), value->size()};
}

Tensor BufferReader::Operand(const char* name, std::size_t min_dims) {
  if (asked_ != nullptr) {
    asked_->operands.emplace_back(name);
    return OneElement();
  }
  const auto buffer = operands_.get<ffi::AnyBuffer>(next_operand_++);
  if (!buffer.has_value() || buffer->dimensions().size() < min_dims) {
    Require(false, name);
    return {};
  }
  return {buffer->untyped_data(), buffer->element_type(), buffer->dimensions()};
}

std::vector<Tensor> BufferReader::Operands(const char* name, std::size_t min_dims) {
  std::vector<Tensor> all;
  if (asked_ != nullptr) return {Operand(name, min_dims)};
  while (next_operand_ < operands_.size() && !failed()) {
    all.push_back(Operand(name, min_dims));
  }
  return all;
}

Tensor BufferReader::Result(const char* name, std::size_t min_dims) {
  if (asked_ != nullptr) {
    asked_->results.emplace_back(name);
    return OneElement();
  }
  auto buffer = results_.get<ffi::AnyBuffer>(next_result_++);
  if (!buffer.has_value() || (*buffer)->dimensions().size() < min_dims) {
    Require(false, name);
    return {};
  }
  return {(*buffer)->untyped_data(), (*buffer)->element_type(),
          (*buffer)->dimensions()};
}

Whereabouts CallReader::ReadWhereabouts() {
  const Tensor rank = Operand("rank", 0);
  const std::int64_t stacked = rank.elements();
  const Whereabouts where = {
      .rank = static_cast<std::int32_t*>(
          Checked(rank, "rank", ffi::DataType::S32, stacked)),
      .group = Operand<std::int32_t>("group", stacked),
      .num_stacked = stacked,
      .num_ranks = Attribute("num_ranks"),
      .call = Text("call", "exchange"),
  };
  if (is_asked()) Scope();
  if (failed()) return where;
  Require(stacked == 1 || stacked == where.num_ranks, "as many ranks as stacked");
  return where;
}

const char* CallReader::Scope() { return Text("scope", ""); }

const char* BufferReader::Text(const char* name, const char* otherwise) {
  if (asked_ != nullptr) {
    asked_->attributes.insert(name);
    return otherwise;
  }
  const auto text = attributes_.get<std::string_view>(name);
  return Interned(text.has_value() ? *text : otherwise);
}

void BufferReader::Require(bool holds, const char* what) {
  if (!holds) Fail(std::string("bad call: it must have ") + what);
}

void BufferReader::Fail(const std::string& why) {
  if (!error_) error_ = why;
}

void* BufferReader::Checked(const Tensor& tensor, const char* name, ffi::DataType type,
                            std::int64_t elements) {
  if (asked_ != nullptr) return nullptr;
  Require(tensor.type == type && tensor.elements() == elements, name);
  return failed() ? nullptr : tensor.data;
}

}  // namespace jax_ep
