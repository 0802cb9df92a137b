#ifndef JAX_EP_FFI_FABRIC_PROCESSES_HOST_H_
#define JAX_EP_FFI_FABRIC_PROCESSES_HOST_H_

#include <sys/types.h>

#include <array>
#include <atomic>
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

#include "fabric/processes/channel.h"
#include "fabric/processes/process_words.h"
#include "fabric/processes/shared_file.h"
#include "fabric/threads/meeting.h"
#include "fabric/work/crew.h"

namespace jax_ep {

// What a process shows to all others of its job: the words of each of its channels.
struct Board {
  static constexpr std::size_t kMaxChannels = 1024;

  static constexpr std::size_t kMaxRanks = 4096;

  // How often a rank has begun to run a call for the first time, and how often it has
  // seen all others of its group do so.
  struct FirstRunsOfRank {
    std::atomic<std::uint64_t> key;  // of group and rank; 0: nobody's
    std::atomic<std::int32_t> begun;
    std::atomic<std::int32_t> met;
  };

  Bell opened;  // rung after words got their key
  std::array<ProcessWords, kMaxChannels> words;
  std::array<FirstRunsOfRank, kMaxRanks> first_runs;
};

// Where to find a process's board.
struct BoardAddress {
  pid_t process;
  int number;
};

// This process among those of its job that run on the same host.
class Host {
 public:
  using Timeout = std::function<std::chrono::duration<double>()>;

  // Makes this process's board. It is number `here` of the job.
  static std::variant<std::unique_ptr<Host>, std::string> Create(std::int32_t here,
                                                                 Timeout timeout);

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
  class Other;
  class OtherChannel;
  class OwnChannel;
  class Search;
  using Interruption = std::function<std::optional<std::string>()>;
  using ChannelKey = std::pair<std::vector<std::int32_t>, std::int64_t>;

  Host(std::int32_t here, std::unique_ptr<SharedFile> file, Board* board,
       Timeout timeout);
  const Other* Find(std::int32_t process);
  std::variant<Neighbors, std::string> ConnectTo(const ChannelKey& key,
                                                 Clock::time_point deadline,
                                                 const Interruption& interruption);
  void OnPhase(Phase phase, Epoch epoch);
  std::variant<std::unique_ptr<Showcase>, std::string> OpenOwn(std::uint64_t key);
  std::vector<const Other*> OthersOf(const ChannelKey& key);

  const std::unique_ptr<SharedFile> file_;
  Board* const board_;
  const Timeout timeout_;
  const std::int32_t here_;

  std::mutex mutex_;                                       // guards all below
  std::map<std::int32_t, std::unique_ptr<Other>> others_;  // they stay for good
  std::size_t num_channels_ = 0;
  std::function<void(Phase, Epoch)> on_phase_;
  Crew crew_;
  std::map<ChannelKey, std::shared_ptr<Channel>> channels_;
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_PROCESSES_HOST_H_
