#ifndef JAX_EP_FFI_FABRIC_HOST_H_
#define JAX_EP_FFI_FABRIC_HOST_H_

#include <sys/types.h>

#include <array>
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

#include "fabric/channel.h"
#include "fabric/crew.h"
#include "fabric/meeting.h"
#include "fabric/process_words.h"
#include "fabric/shared_file.h"

namespace jax_ep {

// What a process shows to all others of its job: the words of each of its channels.
struct Board {
  static constexpr std::size_t kMaxChannels = 1024;

  Bell opened;  // rung after words got their key
  std::array<ProcessWords, kMaxChannels> words;
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

  // Makes this process's board.
  static std::variant<std::unique_ptr<Host>, std::string> Create(Timeout timeout);

  ~Host();
  Host(const Host&) = delete;
  Host& operator=(const Host&) = delete;

  BoardAddress address() const;

  // Opens the boards of all processes of the job, in their order, of which this is
  // number `here`. Returns what went wrong.
  std::optional<std::string> Join(std::int32_t here,
                                  const std::vector<BoardAddress>& boards);

  std::int32_t here() const { return here_; }
  std::int32_t num_processes() const {
    return static_cast<std::int32_t>(others_.size());
  }

  // Returns the channel of the ranks that are in these processes, in one of the groups
  // along a mesh's other axes. It is the same for all meshes that agree in this.
  std::shared_ptr<Relay> ChannelOf(const std::vector<std::int32_t>& process_of,
                                   std::int32_t group);

  // For tests: called as each phase of each channel begins.
  void set_on_phase(std::function<void(Phase, Epoch)> on_phase);

 private:
  class Other;
  class OtherChannel;
  class OwnChannel;
  using ChannelKey = std::pair<std::vector<std::int32_t>, std::int32_t>;

  Host(std::unique_ptr<SharedFile> file, Timeout timeout);
  std::variant<Links, std::string> ConnectTo(const ChannelKey& key,
                                             Clock::time_point deadline);
  void OnPhase(Phase phase, Epoch epoch);
  std::variant<std::unique_ptr<Showcase>, std::string> OpenOwn(std::uint64_t key);
  static std::variant<std::unique_ptr<Neighbor>, std::string> Find(
      const Other& other, std::uint64_t key, Clock::time_point deadline);

  const std::unique_ptr<SharedFile> file_;
  Board* const board_;
  const Timeout timeout_;
  std::int32_t here_ = 0;
  std::vector<std::unique_ptr<Other>> others_;  // by process; null for this one

  std::mutex mutex_;  // guards all below
  std::size_t num_channels_ = 0;
  std::function<void(Phase, Epoch)> on_phase_;
  Crew crew_;
  std::map<ChannelKey, std::shared_ptr<Channel>> channels_;
  std::vector<std::unique_ptr<Showcase>> given_up_;  // before all had connected
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_HOST_H_
