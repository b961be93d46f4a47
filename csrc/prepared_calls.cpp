#include "prepared_calls.h"

#include <mutex>
#include <unordered_map>

namespace sb {
namespace {

struct Plans {
  std::mutex guard;
  std::unordered_map<int64_t, std::shared_ptr<const Plan>> by_number;
  int64_t next = 1;
};
// Never destroyed: at the end of a process, tensors may outlive what they are allocated with.
Plans& plans() {
  static Plans* const all = new Plans;
  return *all;
}

}  // namespace

int64_t keep_plan(Plan plan) {
  auto kept = std::make_shared<const Plan>(std::move(plan));
  const std::lock_guard<std::mutex> lock(plans().guard);
  plans().by_number.emplace(plans().next, std::move(kept));
  return plans().next++;
}

void drop_plan(int64_t number) {
  std::shared_ptr<const Plan> dropped;  // freed without the lock
  const std::lock_guard<std::mutex> lock(plans().guard);
  const auto found = plans().by_number.find(number);
  if (found == plans().by_number.end()) return;
  dropped = std::move(found->second);
  plans().by_number.erase(found);
}

std::shared_ptr<const Plan> plan_of(int64_t number) {
  const std::lock_guard<std::mutex> lock(plans().guard);
  const auto found = plans().by_number.find(number);
  STD_TORCH_CHECK(found != plans().by_number.end(), "attention: expected the number of a plan that is kept, got ",
                  number);
  return found->second;
}

}  // namespace sb
