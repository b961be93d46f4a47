// A build without CUDA compiles this in the place of csrc/cuda.
#include "launchers.h"

namespace sb {

// CUDA tensors get the error of launchers(), which names the cure.
STABLE_TORCH_LIBRARY_IMPL(scatterbrain, CUDA, library) { implement_operators(library); }

}  // namespace sb
