#include "kernels.h"

#define SB_VECTOR_BYTES 16
namespace sb::baseline {
#include "kernels/all.h"
}  // namespace sb::baseline

namespace sb {
extern const InstructionSet kBaseline = baseline::instruction_set_named("baseline");
}  // namespace sb
