#include "prepared_calls.h"

#include <mutex>
#include <unordered_map>

#include "error.h"

namespace sb {
namespace {

struct PreparedCalls {
  std::mutex guard;
  std::unordered_map<int64_t, std::shared_ptr<const PreparedCall>> by_number;
  int64_t next = 1;
};
// Never destroyed: at exit, torch's allocators may be gone before static tensors.
PreparedCalls& calls() {
  static PreparedCalls* const all = new PreparedCalls;
  return *all;
}

}  // namespace

int64_t keep_prepared(PreparedCall call) {
  auto kept = std::make_shared<const PreparedCall>(std::move(call));
  const std::lock_guard<std::mutex> lock(calls().guard);
  calls().by_number.emplace(calls().next, std::move(kept));
  return calls().next++;
}

void discard_prepared(int64_t number) {
  std::shared_ptr<const PreparedCall> discarded;  // outlives the lock, so that tensors are freed without it
  const std::lock_guard<std::mutex> lock(calls().guard);
  const auto found = calls().by_number.find(number);
  if (found == calls().by_number.end()) return;
  discarded = std::move(found->second);
  calls().by_number.erase(found);
}

std::shared_ptr<const PreparedCall> prepared_call(int64_t number) {
  const std::lock_guard<std::mutex> lock(calls().guard);
  const auto found = calls().by_number.find(number);
  SB_CHECK(found != calls().by_number.end(),
           "attention: expected the number of a prepared call that was not discarded, got ", number,
           "; prepare the call again");
  return found->second;
}

}  // namespace sb
