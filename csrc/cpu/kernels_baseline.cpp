#include "kernels.h"

#define SB_VECTOR_BYTES 16
namespace sb::baseline {
#include "kernels.inc"
}  // namespace sb::baseline

namespace sb {
extern const InstructionSet kBaseline = {"baseline", baseline::table<float>(), baseline::table<double>(),
                                         baseline::route_table(), baseline::convert_table()};
}  // namespace sb
