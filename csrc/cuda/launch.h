// Starts kernels. Included by .cu files alone.
#pragma once
#include <algorithm>
#include <type_traits>

#include "../error.h"
#include "device.h"
#include "kernel_time.h"
#include "kernels.h"

namespace sb::cuda {

inline constexpr int64_t kLargestGrid = 0x7fffffff;

// Runs `kernel` with `blocks` blocks, or as many as a grid can have: kernels loop over their tasks.
template <class Params>
void launch(Stream stream, const char* name, int64_t blocks, int threads, int64_t shared_bytes, void (*kernel)(Params),
            const Params& p) {
  static_assert(sizeof(Params) <= 4096, "a kernel's arguments have at most 4 KB");
  if (blocks == 0) return;
  const int64_t grid = std::min(blocks, kLargestGrid);
#if defined(SB_EMULATOR)
  (void)stream;
  emulator::launch(name, grid, threads, shared_bytes, [&] { kernel(p); },
                   {reinterpret_cast<const void*>(kernel), &p, int64_t(sizeof(p))});
#else
  // Beyond 48 KB a kernel has to ask.
  if (shared_bytes > 48 << 10) {
    const cudaError_t refused =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (refused != cudaSuccess) cudaGetLastError();  // else the next launch, of whomever, reports this error
    SB_CHECK(refused == cudaSuccess, "scatterbrain: the kernel ", name, " needs ", shared_bytes,
             " bytes of shared memory, more than this device has for a block: ", cudaGetErrorString(refused),
             "; use fewer clusters or features, a lower rank or a smaller head_dim");
  }
  const KernelTime time(name, stream);
  // Not by <<<>>>, whose error would have to be read from where other libraries leave theirs.
  void* arguments[] = {const_cast<Params*>(&p)};
  const cudaError_t error =
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(grid)), dim3(unsigned(threads)), arguments,
                       size_t(shared_bytes), static_cast<cudaStream_t>(stream.handle));
  if (error != cudaSuccess) cudaGetLastError();  // reported here, not again by whom comes next
  SB_CHECK(error == cudaSuccess, "scatterbrain: the kernel ", name,
           " could not be started: ", cudaGetErrorString(error),
           " (the fault of a kernel before it, of any library, shows here too: CUDA_LAUNCH_BLOCKING=1 finds it)");
#endif
}

// Enough blocks for one thread per element.
inline int64_t blocks_for(int64_t elements, int threads) { return ceil_div(elements, threads); }

// What a block of tiles may have on every device.
inline constexpr int64_t kMostShared = 96 << 10;

// Warps of a block whose every warp takes `bytes` of shared memory: few enough that no device is asked for more than it
// has without.
inline int warps_for(int64_t bytes) { return bytes <= 12 << 10 ? 4 : bytes <= 24 << 10 ? 2 : 1; }

// Calls visit with a null pointer to the element type of the tokens.
template <class Visit>
void with_element(Element element, const Visit& visit) {
  switch (element) {
#if !defined(SB_ONLY_BFLOAT16)
    case Element::kFloat: return visit(static_cast<float*>(nullptr));
#endif
#if defined(SB_ONLY_BFLOAT16)
    case Element::kBfloat16: return visit(static_cast<Bfloat16*>(nullptr));
#elif !defined(SB_ONLY_FLOAT)
    case Element::kDouble: return visit(static_cast<double*>(nullptr));
    case Element::kBfloat16: return visit(static_cast<Bfloat16*>(nullptr));
    case Element::kHalf: return visit(static_cast<Half*>(nullptr));
#endif
    default: SB_CHECK(false, "scatterbrain: this library has no kernels for element type ", int(element));
  }
}

// The same, and with one to the type that sums are in.
template <class Visit>
void with_types(Element element, bool is_wide, const Visit& visit) {
  with_element(element, [&](auto* e) {
    using T = AccType<std::remove_pointer_t<decltype(e)>>;
    if constexpr (std::is_same_v<T, float>)
      is_wide ? visit(e, static_cast<double*>(nullptr)) : visit(e, static_cast<float*>(nullptr));
    else
      visit(e, static_cast<double*>(nullptr));
  });
}

}  // namespace sb::cuda
