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
std::mutex guard;
std::vector<Record> records;

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

thread_local Stage* innermost = nullptr;

Stage::Stage(const char* name) : name_(name), start_(recording.load(std::memory_order_relaxed) ? now() : -1) {
  if (start_ >= 0) around_ = std::exchange(innermost, this);
}

Stage::~Stage() {
  if (start_ < 0) return;
  int64_t spent = now() - start_;
  innermost = around_;
  if (around_) around_->inside_ += spent;
  spent -= inside_;
  const std::lock_guard<std::mutex> lock(guard);
  for (Record& record : records)
    if (record.name == std::string(name_)) {
      ++record.calls, record.nanoseconds += spent;
      return;
    }
  records.push_back({name_, 1, spent});
}

std::string record_stages(bool on) {
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
