// The handlers of a library, listed by the files that define them: what Python
// registers with XLA, and compares with what it is about to pass.
#ifndef JAX_EP_FFI_BIND_HANDLER_LIST_H_
#define JAX_EP_FFI_BIND_HANDLER_LIST_H_

#include <utility>
#include <vector>

#include "bind/call_reader.h"

namespace jax_ep {

// One target of foreign calls.
struct Handler {
  const char* target;
  // XLA's name of each stage that the library carries out, and its symbol.
  std::vector<std::pair<const char*, const char*>> stages;
  Signature (*signature)();
};

// Adds one to the library's list; returns true, so that a file can do it as it is
// loaded.
bool ListHandler(Handler handler);

// What a function asks a reader for, that a handler reads its calls with.
template <typename Reader, typename Call>
Signature Asked(Call (*read)(Reader&)) {
  Signature asked;
  Reader reader(asked);
  read(reader);
  return asked;
}
template <auto read>
Signature SignatureOf() {
  return Asked(read);
}

}  // namespace jax_ep

// Lists the handler jax_ep_NAME, whose calls `read` reads. What follows are its stages.
#define EP_LIST_HANDLER(name, read, ...)                                 \
  namespace {                                                            \
  [[maybe_unused]] const bool listed_##name = ::jax_ep::ListHandler(     \
      {"jax_ep_" #name, {__VA_ARGS__}, &::jax_ep::SignatureOf<(read)>}); \
  }

#endif  // JAX_EP_FFI_BIND_HANDLER_LIST_H_
