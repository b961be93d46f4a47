// The time that each stage of an operator takes, recorded on request (scatterbrain.profile). Off, a stage costs one
// relaxed load.
#pragma once
#include <cstdint>
#include <string>

namespace sb {

// Adds the time between construction and destruction, less that of stages inside, to the stage `name` (a string
// literal). Stages are timed on the thread that launches them, whole parallel loops at a time.
class Stage {
 public:
  explicit Stage(const char* name);
  ~Stage();
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;

 private:
  const char* name_;
  int64_t start_, inside_ = 0;
  Stage* around_ = nullptr;
};

// For what runs on a device, whose times are known only after it has ended: whether stages are recorded, one that was
// timed there, and what record_stages calls first, to have all of them added.
bool is_recording();
void add_stage(const char* name, int64_t nanoseconds);
void before_report(void (*add_stages)());

// Starts or stops recording. Returns and clears what was recorded since the last call: "stage\tcalls\tnanoseconds\n"
// per stage, in the order in which they first ran.
std::string record_stages(bool on);

}  // namespace sb
