// Implements call_site.h.
#include "bind/process/call_site.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "bind/process/process.h"
#include "fabric/processes/hash.h"

namespace jax_ep {
namespace {

std::int64_t IdOf(std::span<const std::int64_t> members) {
  std::uint64_t hash = kHashSeed;
  for (const std::int64_t member : members) hash = Mix(hash, member);
  return static_cast<std::int64_t>(hash);
}

}  // namespace

ffi::TypeId CallSite::id = {};
const ffi::TypeInfo CallSite::info = ffi::MakeTypeInfo<CallSite>();

std::vector<std::int32_t> Group::Processes() const {
  std::vector<std::int32_t> processes;
  processes.reserve(members.size());
  for (std::size_t rank = 0; rank < members.size(); ++rank) {
    processes.push_back(ProcessOf(rank));
  }
  return processes;
}

bool Group::Spans(std::int32_t process) const {
  for (std::size_t rank = 0; rank < members.size(); ++rank) {
    if (ProcessOf(rank) != process) return true;
  }
  return false;
}

Group FindGroup(CallReader& reader, std::int32_t device, Role role) {
  const Whereabouts& where = reader.where();
  if (reader.failed()) return {};
  const std::int32_t rank = role.rank;
  reader.Require(rank >= 0 && rank < where.num_ranks, "a rank of these");
  const std::span<const std::int64_t> all = reader.List("members");
  if (all.empty() || reader.failed())
    return {.number = role.group, .members = {}, .id = 0};
  const std::int64_t self = (static_cast<std::int64_t>(ProcessIndex()) << 32) | device;
  const auto found = std::ranges::find(all, self);
  const std::int64_t index = found - all.begin();
  if (found == all.end() || index % where.num_ranks != rank) {
    reader.Fail(std::string(where.call) +
                ": the program was compiled for other devices than device " +
                std::to_string(device) + " of process " +
                std::to_string(ProcessIndex()) + " as rank " + std::to_string(rank) +
                ": jit the function anew for this mesh, or give the mesh to shard_map");
    return {};
  }
  const auto members = all.subspan(static_cast<std::size_t>(index - rank),
                                   static_cast<std::size_t>(where.num_ranks));
  return {.number = static_cast<std::int32_t>(index / where.num_ranks),
          .members = members,
          .id = IdOf(members)};
}

bool CallSite::IsNewTo(std::int32_t device) {
  const std::scoped_lock lock(mutex_);
  return devices_.insert(device).second;
}

std::optional<Role> CallSite::RoleOf(std::int32_t device,
                                     const std::function<std::optional<Role>()>& find) {
  {
    const std::scoped_lock lock(mutex_);
    const auto known = roles_.find(device);
    if (known != roles_.end()) return known->second;
  }
  const std::optional<Role> found = find();
  if (!found) return std::nullopt;
  const std::scoped_lock lock(mutex_);
  return roles_.emplace(device, *found).first->second;
}

std::shared_ptr<const Span> CallSite::SpanOf(
    std::int32_t device, const std::function<std::shared_ptr<const Span>()>& make) {
  {
    const std::scoped_lock lock(mutex_);
    const auto known = spans_.find(device);
    if (known != spans_.end()) return known->second;
  }
  std::shared_ptr<const Span> made = make();
  if (made == nullptr) return nullptr;
  const std::scoped_lock lock(mutex_);
  return spans_.emplace(device, std::move(made)).first->second;
}

namespace {

ffi::ErrorOr<std::unique_ptr<CallSite>> NewCallSite() {
  static std::atomic<std::int64_t> next{0};
  auto site = std::make_unique<CallSite>();
  site->number = next.fetch_add(1, std::memory_order_relaxed);
  return site;
}

}  // namespace
}  // namespace jax_ep

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_new_call_site, jax_ep::NewCallSite,
                              xla::ffi::Ffi::BindInstantiate());
