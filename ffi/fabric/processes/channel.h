// The exchanges of one group of ranks in several processes, from when the ranks of this
// one have come. Made by hosts; meeting points hand exchanges to them.

#ifndef JAX_EP_FFI_FABRIC_PROCESSES_CHANNEL_H_
#define JAX_EP_FFI_FABRIC_PROCESSES_CHANNEL_H_

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "common/work.h"
#include "fabric/processes/channel_errors.h"
#include "fabric/processes/neighbor.h"
#include "fabric/processes/process_words.h"
#include "fabric/threads/meeting.h"
#include "fabric/work/work_share.h"

namespace jax_ep {

// Exchanges between the processes of one group of ranks, in the protocol of
// docs/protocol.md. The ranks of a process come together first; then a thread of the
// channel copies what they lend into the process's window, waits for the others'
// windows, and runs the ranks' work, which reads them. All processes carry out the same
// exchanges in the same order: that in which they come together in the process of rank
// 0, which leads, unless it is the same in all of them by itself. Once an exchange has
// failed all later ones do, at once.
class Channel : public Relay {
 public:
  struct Options {
    Open open;
    Connect connect;
    Schedule schedule;  // for helpers and for those who are told
    std::function<std::chrono::duration<double>()> timeout;
    std::int64_t max_threads;  // that work for this process at once
    // Whether ranks come to the same exchanges in the same order in all processes, as
    // they do where XLA launches what they do in one order. Then nobody has to lead,
    // and an exchange needs no name.
    bool is_ordered = false;
    // Told of every phase as it begins; for tests.
    std::function<void(Phase, Epoch)> on_phase = nullptr;
  };

  Channel(const std::vector<std::int32_t>& process_of, std::int32_t here,
          Options options);
  ~Channel() override;
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  void Take(std::shared_ptr<Meeting> meeting) override;
  void Break(const std::string& why) override;

 private:
  using Failure = std::optional<std::string>;

  void Serve();
  Failure OpenOwn();
  Failure ConnectToOthers();
  Failure WhatStopsIt();
  std::shared_ptr<Meeting> NextMeeting(Failure& failure);
  std::shared_ptr<Meeting> TakeFirst(Failure& failure);
  Failure NameExchange(ExchangeName& name);
  std::shared_ptr<Meeting> FindMeeting(const ExchangeName& name, Failure& failure);
  Failure Exchange(Meeting& meeting);
  Failure AwaitReaders();
  Failure Publish(const Meeting& meeting);
  Failure AwaitOthers(const Meeting& meeting);
  Failure FillTables(Meeting& meeting);
  Failure Await(Neighbor& neighbor,
                const std::function<bool(const ProcessWords&)>& done, const char* what);
  const Neighbor* Quitter() const;
  Standing Now() const;
  void Enter(Phase phase);
  void ShareCores(ProcessWords& own) const;
  void GiveUp(const std::string& why, std::vector<std::shared_ptr<Meeting>> meetings);
  void Fail(const std::vector<std::shared_ptr<Meeting>>& meetings);
  bool leads() const { return process_of_[0] == here_; }

  const std::vector<std::int32_t> process_of_;
  const std::int32_t here_;
  const Options options_;

  // Only the channel's thread uses these.
  std::unique_ptr<Showcase> own_;
  Neighbors neighbors_;
  bool is_connected_ = false;
  Epoch epoch_ = 0;  // of the exchange at hand
  Phase phase_ = Phase::kIdle;
  std::int64_t named_ = 0;  // when the leader had named it, if calls are recorded
  Clock::time_point deadline_;
  std::chrono::duration<double> timeout_{};

  std::mutex mutex_;  // guards all below
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Meeting>> waiting_;  // in the order in which they came
  Failure failure_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_PROCESSES_CHANNEL_H_
