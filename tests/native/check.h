// A small test framework: a test is a function, a failed check prints what it compared.

#ifndef JAX_EP_TESTS_NATIVE_CHECK_H_
#define JAX_EP_TESTS_NATIVE_CHECK_H_

#include <cstddef>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace jax_ep {

// Of many cases that are alike, one in so many is tried: all, but under the sanitizer
// that makes a chunk on threads of its own take a hundred times as long.
#if defined(__SANITIZE_THREAD__)
inline constexpr std::size_t kOneIn = 8;
#else
inline constexpr std::size_t kOneIn = 1;
#endif

// Registers a test for the `main` in check.cc.
class Test {
 public:
  Test(const char* name, void (*run)());
};

// Says in the failures of this thread, while it lives, which case they are of.
class Case {
 public:
  explicit Case(std::string text);
  ~Case();
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;

 private:
  std::string outer_;
};

// Notes a failure of the running test, which goes on. Any thread may call it.
void NoteFailure(const char* file, int line, const std::string& what);

template <typename T>
std::string Show(const T& value) {
  std::ostringstream text;
  if constexpr (std::is_integral_v<T>) {
    text << +value;
  } else {
    text << value;
  }
  return text.str();
}

template <typename T>
std::string Show(const std::vector<T>& values) {
  constexpr std::size_t kShown = 64;
  std::string text = "[";
  for (std::size_t i = 0; i < values.size() && i < kShown; ++i) {
    text += (i == 0 ? "" : ", ") + Show(values[i]);
  }
  return text + (values.size() > kShown ? ", …]" : "]");
}

template <typename T>
bool CheckEqual(const char* file, int line, const char* what, const T& got,
                const std::type_identity_t<T>& want) {
  if (got == want) return true;
  NoteFailure(file, line,
              std::string(what) + " is " + Show(got) + ", not " + Show(want));
  return false;
}

}  // namespace jax_ep

// Defines and registers a test.
#define EP_TEST(name)                                   \
  static void name();                                   \
  static const ::jax_ep::Test name##_test(#name, name); \
  static void name()

// Both give whether the check held.
#define EP_CHECK(condition) \
  ((condition) || (::jax_ep::NoteFailure(__FILE__, __LINE__, #condition), false))
#define EP_CHECK_EQ(got, want) ::jax_ep::CheckEqual(__FILE__, __LINE__, #got, got, want)

#endif  // JAX_EP_TESTS_NATIVE_CHECK_H_
