// Reads a foreign call's operands, results and attributes by name, and notes their
// names for Python to compare with its own. For all handlers, on all platforms.
#ifndef JAX_EP_FFI_BIND_CALL_READER_H_
#define JAX_EP_FFI_BIND_CALL_READER_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "common/dtype.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

namespace ffi = xla::ffi;

// The kernels' name of an XLA element type, if they compute with it.
std::optional<DType> KernelDType(ffi::DataType type);

// XLA's name of the type of an array's elements.
template <typename T>
constexpr ffi::DataType DataTypeOf() {
  if constexpr (std::is_same_v<T, bool>) return ffi::DataType::PRED;
  if constexpr (std::is_same_v<T, std::uint32_t>) return ffi::DataType::U32;
  if constexpr (std::is_same_v<T, float>) return ffi::DataType::F32;
  static_assert(sizeof(T) <= 4);
  return ffi::DataType::S32;
}

// An operand or result: its first element and what it has been found to be.
struct Tensor {
  void* data = nullptr;
  ffi::DataType type = ffi::DataType::INVALID;
  ffi::AnyBuffer::Dimensions dims{nullptr, 0};

  // The axis that is `back` places from the last one: 0 is the last.
  std::int64_t dim(std::size_t back) const { return dims[dims.size() - 1 - back]; }
  std::int64_t elements() const;
  std::int64_t byte_width() const {
    return static_cast<std::int64_t>(ffi::ByteWidth(type));
  }
};

// Which ranks an exchange's call is for. What it points to is where the call runs:
// maybe on a device that the host cannot read.
struct Whereabouts {
  const std::int32_t* rank;   // [num_stacked]
  const std::int32_t* group;  // [num_stacked]
  std::int64_t num_stacked;   // ranks whose operands this call holds
  std::int64_t num_ranks;
  const char* call;  // the public function that wants this, for errors; never freed
};

// The names of what a handler reads of its calls, in the order in which it does.
struct Signature {
  std::vector<std::string> operands;
  std::vector<std::string> results;
  std::set<std::string> attributes;
};

// Reads one call. The first thing found wrong is kept as the error; what is read after
// it is empty.
class BufferReader {
 public:
  BufferReader(ffi::RemainingArgs operands, ffi::RemainingRets results,
               ffi::Dictionary attributes)
      : operands_(operands), results_(results), attributes_(attributes) {}

  // Reads no call, but notes what it is asked for. Every number is 1, and every array
  // has one element, which nobody may look at.
  explicit BufferReader(Signature& asked);

  std::int64_t Attribute(const char* name);

  // An attribute that is a list; empty if it is not there.
  std::span<const std::int64_t> List(const char* name);

  // The next operand or result, of any shape; or of `elements` in all.
  Tensor Operand(const char* name, std::size_t min_dims);
  Tensor Result(const char* name, std::size_t min_dims);
  template <typename T>
  T* Operand(const char* name, std::int64_t elements) {
    return static_cast<T*>(Checked(Operand(name, 0), name, DataTypeOf<T>(), elements));
  }
  template <typename T>
  T* Result(const char* name, std::int64_t elements) {
    return static_cast<T*>(Checked(Result(name, 0), name, DataTypeOf<T>(), elements));
  }
  void* Operand(const char* name, ffi::DataType type, std::int64_t elements) {
    return Checked(Operand(name, 0), name, type, elements);
  }
  void* Result(const char* name, ffi::DataType type, std::int64_t elements) {
    return Checked(Result(name, 0), name, type, elements);
  }

  std::size_t results_left() const {
    return asked_ != nullptr ? 0 : results_.size() - next_result_;
  }

  // All operands that are left.
  std::vector<Tensor> Operands(const char* name, std::size_t min_dims);

  void Require(bool holds, const char* what);
  void Fail(const std::string& why);
  bool failed() const { return error_.has_value(); }
  ffi::Error error() const { return ffi::Error::InvalidArgument("jax_ep: " + *error_); }

 protected:
  bool is_asked() const { return asked_ != nullptr; }
  // A text, never freed; or the other one, if it is not there.
  const char* Text(const char* name, const char* otherwise);
  void* Checked(const Tensor& tensor, const char* name, ffi::DataType type,
                std::int64_t elements);

 private:
  ffi::RemainingArgs operands_;
  ffi::RemainingRets results_;
  ffi::Dictionary attributes_;
  Signature* asked_ = nullptr;  // or null: this reads a call
  std::size_t next_operand_ = 0;
  std::size_t next_result_ = 0;
  std::optional<std::string> error_;
};

// Reads the call of an exchange.
class CallReader : public BufferReader {
 public:
  CallReader(ffi::RemainingArgs operands, ffi::RemainingRets results,
             ffi::Dictionary attributes)
      : BufferReader(operands, results, attributes), where_(ReadWhereabouts()) {}

  explicit CallReader(Signature& asked)
      : BufferReader(asked), where_(ReadWhereabouts()) {}

  const Whereabouts& where() const { return where_; }

  // The layer's name in the program; never freed.
  const char* Scope();

 private:
  Whereabouts ReadWhereabouts();

  Whereabouts where_;
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_BIND_CALL_READER_H_
