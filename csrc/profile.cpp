#include "profile.h"

#include <atomic>
#include <chrono>
#include <mutex>
#include <utility>
#include <vector>

namespace sb {
namespace {

struct Record {
  const char* name;
  int64_t calls, nanoseconds;
};
std::atomic<bool> recording{false};
std::atomic<void (*)()> add_stages_of_devices{nullptr};
std::mutex guard;
std::vector<Record> records;

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

thread_local Stage* innermost = nullptr;

Stage::Stage(const char* name) : name_(name), start_(is_recording() ? now() : -1) {
  if (start_ >= 0) around_ = std::exchange(innermost, this);
}

Stage::~Stage() {
  if (start_ < 0) return;
  const int64_t spent = now() - start_;
  innermost = around_;
  if (around_) around_->inside_ += spent;
  add_stage(name_, spent - inside_);
}

bool is_recording() { return recording.load(std::memory_order_relaxed); }

void add_stage(const char* name, int64_t nanoseconds) {
  const std::lock_guard<std::mutex> lock(guard);
  for (Record& record : records)
    if (record.name == std::string(name)) {
      ++record.calls, record.nanoseconds += nanoseconds;
      return;
    }
  records.push_back({name, 1, nanoseconds});
}

void before_report(void (*add_stages)()) { add_stages_of_devices.store(add_stages); }

std::string record_stages(bool on) {
  if (const auto add_stages = add_stages_of_devices.load()) add_stages();
  const std::lock_guard<std::mutex> lock(guard);
  std::string text;
  for (const Record& record : records)
    text += std::string(record.name) + '\t' + std::to_string(record.calls) + '\t' + std::to_string(record.nanoseconds) +
            '\n';
  records.clear();
  recording.store(on, std::memory_order_relaxed);
  return text;
}

}  // namespace sb
