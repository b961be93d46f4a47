// What cuda/matrix.h asks of the emulator. Further faults:
//   asynchronous copy   bytes under way are read or written, or a thread leaves without a wait for them
#pragma once
#include "emulator.h"

namespace sb::emulator {

void copy_async(int64_t offset, const void* from, bool is_there, int64_t bytes, Place place);
void commit_copies();
void wait_copies(int open_groups, Place place);

void load_matrices(int64_t offset, uint32_t (&to)[4], bool is_transposed, Place place);
void multiply_add(float (&sum)[4], const uint32_t (&left)[4], uint32_t right_0, uint32_t right_1, bool is_bfloat16,
                  Place place);
void multiply_add_tf32(float (&sum)[4], const uint32_t (&left)[4], uint32_t right_0, uint32_t right_1, Place place);

}  // namespace sb::emulator
