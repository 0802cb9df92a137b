// What a channel sees of the other processes, and what it shows them of its own.
// Used by channels; implemented by hosts in shared memory, and by tests in plain one.

#ifndef JAX_EP_FFI_FABRIC_PROCESSES_NEIGHBOR_H_
#define JAX_EP_FFI_FABRIC_PROCESSES_NEIGHBOR_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "fabric/processes/process_words.h"

namespace jax_ep {

// Another process of a channel, as seen from here.
class Neighbor {
 public:
  virtual ~Neighbor() = default;
  virtual const ProcessWords& words() const = 0;
  // One half of its window, of at least so many bytes, or null and the problem if it
  // cannot be mapped.
  virtual const char* Half(std::size_t half, std::size_t bytes,
                           std::string& problem) = 0;
  virtual bool alive() const = 0;
  virtual std::int32_t process() const = 0;

  bool has_given_up() const {
    return words().gave_up.load(std::memory_order_acquire) != 0;
  }
};

// What this process shows to the others of a channel.
class Showcase {
 public:
  virtual ~Showcase() = default;
  virtual ProcessWords& words() = 0;
  virtual char* Half(std::size_t half, std::size_t bytes, std::string& problem) = 0;
};

using Neighbors = std::vector<std::unique_ptr<Neighbor>>;  // by process, ascending

using Clock = std::chrono::steady_clock;

// How soon the end of a process is noticed: nothing rings then, so those that wait for
// it look this often. Rarely enough to keep no core busy.
inline constexpr std::chrono::milliseconds kLook{50};

// What there is, if anything, to stop a wait for others.
using Interruption = std::function<std::optional<std::string>()>;

// Shows this process to the others of a channel. If it cannot, it says why, and has
// told them that it gave up.
using Open = std::function<std::variant<std::unique_ptr<Showcase>, std::string>()>;

// Waits for what the others show, or says why it does not: also, and soon, when
// `interruption` has something to say.
using Connect = std::function<std::variant<Neighbors, std::string>(
    Clock::time_point deadline, const Interruption& interruption)>;

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_PROCESSES_NEIGHBOR_H_
