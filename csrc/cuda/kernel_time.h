// The time of a kernel on its stream, as a stage of scatterbrain.profile: an event before the kernel and one after it,
// which are read when the recording ends. Nothing waits for the device until then.
#pragma once
#include "params.h"

namespace sb::cuda {

class KernelTime {
 public:
  // `name`: a string literal.
  KernelTime(const char* name, Stream stream);
  ~KernelTime();
  KernelTime(const KernelTime&) = delete;
  KernelTime& operator=(const KernelTime&) = delete;

 private:
  const char* const name;
  const Stream stream;
  void* start = nullptr;
};

}  // namespace sb::cuda
