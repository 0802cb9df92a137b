// When streams came to exchanges and went on, by their GPUs' clocks: a ring in memory
// of the host, into which GPUs write. Filled while calls are recorded; Python reads it.

#ifndef JAX_EP_FFI_FABRIC_GPUS_STREAM_TIMES_H_
#define JAX_EP_FFI_FABRIC_GPUS_STREAM_TIMES_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <span>

namespace jax_ep {

// Puts on a stream that it writes its GPU's clock to a place.
using Stamp = cudaError_t (*)(std::int64_t* place, cudaStream_t stream);

inline constexpr std::int64_t kNotRecorded = -1;

// One rank's stream in one exchange. All are 8 bytes wide, for
// jax_ep/_stream_times.py to read. Times are nanoseconds of the GPU's clock, 0 where
// the stream has not come yet.
struct StreamTimes {
  std::int64_t number;    // of these times in this process
  std::int64_t exchange;  // that of its record: see CallRecord
  std::int64_t rank;
  std::int64_t device;
  std::int64_t came;   // what the rank lends was ready, as peers may just have seen
  std::int64_t began;  // what all lend was ready
  std::int64_t ended;  // its kernels had
  std::int64_t told;   // all of this process had read what it lends
};
static_assert(sizeof(StreamTimes) == 8 * 8);

// Of so many the latest are held: 8 MB, which are pinned when the first stream is
// timed.
inline constexpr std::size_t kMaxStreamTimes = 1 << 17;

// A place for times, all 0; null if there is no memory for them. It is somebody else's
// when so many more have been claimed: a stream holds far fewer operations. The current
// device must be one that this process uses.
StreamTimes* ClaimStreamTimes();

// How many have been claimed until now.
std::uint64_t NumStreamTimes();

// Copies those of the times from number `from` on, as many as there is room for, that
// are there and whole, in order; returns how many these are. Nobody is waited for:
// times of streams that have not come to the end are left out.
std::size_t ReadStreamTimes(std::uint64_t from, std::span<StreamTimes> room);

// A stream on its way through an exchange, which is timed unless it is the empty one,
// or something fails: that is no failure of the exchange.
class TimedStream {
 public:
  TimedStream() = default;
  TimedStream(Stamp stamp, cudaStream_t stream)
      : stamp_(stamp), stream_(stream), times_(ClaimStreamTimes()) {}

  // Whose times these are. Without an exchange that is recorded they are dropped.
  struct Owner {
    std::int64_t exchange;
    std::int64_t rank;
    std::int64_t device;
  };
  void Belong(const Owner& owner);

  // Has the stream write down when it comes here.
  void Note(std::int64_t StreamTimes::* which);

 private:
  Stamp stamp_ = nullptr;
  cudaStream_t stream_ = nullptr;
  StreamTimes* times_ = nullptr;
};

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_GPUS_STREAM_TIMES_H_
