#include "launchers.h"

namespace sb::cuda {

void fill(Launchers& table) {
  table.attention = &attention;
  table.project = &project;
  table.project_packed = &project_packed;
  table.project_backward = &project_backward;
}

}  // namespace sb::cuda
