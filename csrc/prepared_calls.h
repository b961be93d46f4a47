// Calls of a kind that was checked before (scatterbrain/plans.py): all that they pass but the tokens is kept here,
// since an argument's way from the interpreter to an operator takes about as long as a hundred products of a kernel.
#pragma once
#include <memory>
#include <vector>

#include "checks.h"

namespace sb {

struct Plan {
  QuadraticArguments arguments;
  std::vector<Tensor> sources, copies;  // what the projections were made from, and what it held then
};

// Keeps a plan until it is dropped, and returns its number, which no other plan ever has.
int64_t keep_plan(Plan plan);
void drop_plan(int64_t number);
std::shared_ptr<const Plan> plan_of(int64_t number);

}  // namespace sb
