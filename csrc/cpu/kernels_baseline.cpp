#include "kernels/tables.h"  // for the set that kernels/isa.h falls back to

namespace sb {
extern const InstructionSet kBaseline = baseline::instruction_set_named("baseline");
}  // namespace sb
