// How Python is told of a problem by functions that it calls by ctypes.
#ifndef JAX_EP_FFI_BIND_PROCESS_TELL_H_
#define JAX_EP_FFI_BIND_PROCESS_TELL_H_

#include <cstddef>
#include <cstdio>
#include <string>

namespace jax_ep {

// Writes a text, and the zero that ends it, into so many bytes; what does not fit is
// left out.
inline void Tell(const std::string& text, char* to, int bytes) {
  if (bytes <= 0) return;
  std::snprintf(to, static_cast<std::size_t>(bytes), "%s", text.c_str());
}

}  // namespace jax_ep

#endif  // JAX_EP_FFI_BIND_PROCESS_TELL_H_
