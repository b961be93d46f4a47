#include "kernel_time.h"

#if !defined(SB_EMULATOR)
#include <cuda_runtime_api.h>

#include <deque>
#include <mutex>

#include "../profile.h"

namespace sb::cuda {
namespace {

struct Timed {
  const char* name;
  cudaEvent_t start, end;
};
std::mutex guard;
std::deque<Timed> running;  // in the order in which they were started
// A recording of a whole process holds no more than about so many events: what has ended is read on the way.
constexpr size_t kMostRunning = 4096;

// Takes back what a refusal, or an event that is not over, leaves as the last error: the next launch, of whomever,
// would report it.
bool succeeded(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess;
}

// Null where the stream takes none: while it is captured in a graph, whose replays are not recorded.
cudaEvent_t record(Stream stream) {
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  cudaStreamCaptureStatus capture;
  cudaEvent_t event = nullptr;
  if (!succeeded(cudaStreamIsCapturing(handle, &capture)) || capture != cudaStreamCaptureStatusNone) return nullptr;
  if (!succeeded(cudaEventCreate(&event))) return nullptr;
  if (succeeded(cudaEventRecord(event, handle))) return event;
  cudaEventDestroy(event);
  return nullptr;
}

void read(const Timed& timed) {
  float milliseconds = 0;
  if (succeeded(cudaEventElapsedTime(&milliseconds, timed.start, timed.end)))
    add_stage(timed.name, int64_t(double(milliseconds) * 1e6));
  cudaEventDestroy(timed.start);
  cudaEventDestroy(timed.end);
}

void read_all() {
  const std::lock_guard<std::mutex> lock(guard);
  for (const Timed& timed : running) {
    succeeded(cudaEventSynchronize(timed.end));
    read(timed);
  }
  running.clear();
}

[[maybe_unused]] const bool is_collected = (before_report(&read_all), true);

}  // namespace

KernelTime::KernelTime(const char* name, Stream stream) : name(name), stream(stream) {
  if (is_recording()) start = record(stream);
}

KernelTime::~KernelTime() {
  if (start == nullptr) return;
  const auto started = static_cast<cudaEvent_t>(start);
  const cudaEvent_t end = record(stream);
  if (end == nullptr) {
    cudaEventDestroy(started);
    return;
  }
  const std::lock_guard<std::mutex> lock(guard);
  running.push_back({name, started, end});
  while (running.size() > kMostRunning && succeeded(cudaEventQuery(running.front().end))) {
    read(running.front());
    running.pop_front();
  }
}

}  // namespace sb::cuda
#endif
