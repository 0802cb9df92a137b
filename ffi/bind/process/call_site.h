// One custom call of a compiled program, and the ranks that a device's rank exchanges
// with there. For all fabrics whose ranks are on several devices.
#ifndef JAX_EP_FFI_BIND_PROCESS_CALL_SITE_H_
#define JAX_EP_FFI_BIND_PROCESS_CALL_SITE_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <vector>

#include "bind/call_reader.h"
#include "fabric/threads/meeting.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

// The ranks that a device's rank exchanges with, as the program's mesh has it.
struct Group {
  // Which of the mesh's groups of ranks. Without a list of members: which along the
  // axes that the program knows of, all of this process.
  std::int32_t number;
  std::span<const std::int64_t> members;  // by rank: its process << 32 | device's id
  std::int64_t id;                        // the same for equal members only

  std::int32_t ProcessOf(std::size_t rank) const {
    return static_cast<std::int32_t>(members[rank] >> 32);
  }
  std::vector<std::int32_t> Processes() const;  // by rank
  bool Spans(std::int32_t process) const;
};

// Which rank a device's call is for, and of which group, as the program computes them.
struct Role {
  std::int32_t rank;
  std::int32_t group;
};

// Finds the group that a device's call belongs to. XLA's ordinal of a CPU device is its
// id in the whole job: where members are listed, no two devices have one rank of one
// group, whatever their program says. What it returns refers to the call's attributes;
// it is of no use once the reader has failed.
Group FindGroup(CallReader& reader, std::int32_t device, Role role);

// Identifies one custom call of a compiled program, the same for all its devices. XLA
// makes it when it instantiates the call, so that two calls of one traced function are
// told apart although everything else about them is equal.
struct CallSite {
  static ffi::TypeId id;
  static const ffi::TypeInfo info;

  // Returns whether a device runs the call for the first time.
  bool IsNewTo(std::int32_t device);

  // A device's role, once `find` has found it: it is the same in every run.
  std::optional<Role> RoleOf(std::int32_t device,
                             const std::function<std::optional<Role>()>& find);

  // Where a device's rank meets its peers at this call, of which some are in other
  // processes, once `make` has found it; null if it could not.
  std::shared_ptr<const Span> SpanOf(
      std::int32_t device, const std::function<std::shared_ptr<const Span>()>& make);

  std::int64_t number;

 private:
  std::mutex mutex_;  // guards all below
  std::set<std::int32_t> devices_;
  std::map<std::int32_t, Role> roles_;                         // by device
  std::map<std::int32_t, std::shared_ptr<const Span>> spans_;  // by device
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_BIND_PROCESS_CALL_SITE_H_
