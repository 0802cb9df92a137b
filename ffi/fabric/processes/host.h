// This process's place among those of its job: its board, the others', its channels.
// Made once by ffi/bind/cpu; first runs look at boards through it.

#ifndef JAX_EP_FFI_FABRIC_PROCESSES_HOST_H_
#define JAX_EP_FFI_FABRIC_PROCESSES_HOST_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "fabric/processes/board.h"
#include "fabric/processes/channel.h"
#include "fabric/processes/neighbor.h"
#include "fabric/processes/other_process.h"
#include "fabric/processes/process_words.h"
#include "fabric/processes/shared_file.h"
#include "fabric/threads/meeting.h"
#include "fabric/work/crew.h"

namespace jax_ep {

// This process among those of its job that run on the same host.
class Host {
 public:
  using Timeout = std::function<std::chrono::duration<double>()>;

  // Makes this process's board. It is number `here` of the job. Its channels take
  // exchanges in the order in which ranks come to them, if this is the same everywhere.
  static std::variant<std::unique_ptr<Host>, std::string> Create(
      std::int32_t here, Timeout timeout, bool is_ordered = false);

  ~Host();
  Host(const Host&) = delete;
  Host& operator=(const Host&) = delete;

  BoardAddress address() const;

  // Opens the board of another process of the job, or does nothing if it is open.
  // Returns what went wrong.
  std::optional<std::string> Open(std::int32_t process, BoardAddress address);

  std::int32_t here() const { return here_; }

  // Returns the channel of a group of ranks that are in these processes, whose boards
  // are open. It is the same for all meshes that have this group.
  std::shared_ptr<Relay> ChannelOf(const std::vector<std::int32_t>& process_of,
                                   std::int64_t group);

  // What this process says of first runs of one of its ranks, or null if there is no
  // room to say it.
  Board::FirstRunsOfRank* OwnFirstRuns(std::int64_t group, std::int32_t rank);

  // What processes say: of a rank's first runs, or null, and whether the ranks of
  // another process have come to an exchange, and to no later one.
  const Board::FirstRunsOfRank* FirstRunsOf(std::int32_t process, std::int64_t group,
                                            std::int32_t rank);
  bool IsIn(std::int32_t process, const std::vector<std::int32_t>& process_of,
            std::int64_t group, const ExchangeName& name);
  bool IsAlive(std::int32_t process);

  // For tests: called as each phase of each channel begins.
  void set_on_phase(std::function<void(Phase, Epoch)> on_phase);

 private:
  using ChannelKey = std::pair<std::vector<std::int32_t>, std::int64_t>;

  Host(std::int32_t here, std::unique_ptr<SharedFile> file, Board* board,
       Timeout timeout, bool is_ordered);
  const OtherProcess* Find(std::int32_t process);
  void OnPhase(Phase phase, Epoch epoch);
  std::variant<std::unique_ptr<Showcase>, std::string> Show(const ChannelKey& key);
  std::vector<const OtherProcess*> OthersOf(const ChannelKey& key);

  const std::unique_ptr<SharedFile> file_;
  Board* const board_;
  const Timeout timeout_;
  const std::int32_t here_;
  const bool is_ordered_;

  std::mutex mutex_;                                              // guards all below
  std::map<std::int32_t, std::unique_ptr<OtherProcess>> others_;  // they stay for good
  std::size_t num_channels_ = 0;
  std::function<void(Phase, Epoch)> on_phase_;
  Crew crew_;
  std::map<ChannelKey, std::shared_ptr<Channel>> channels_;
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_PROCESSES_HOST_H_
