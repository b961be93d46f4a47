// Where the time of an operator goes, stage by stage, when somebody asks (scatterbrain.profile). Off, a stage costs one
// relaxed load.
#pragma once
#include <string>

namespace sb {

// The time between construction and destruction counts for the stage `name` (a string literal). Stages are timed on the
// thread that launches them, whole parallel loops at a time, and never nest.
class Stage {
 public:
  explicit Stage(const char* name);
  ~Stage();
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;

 private:
  const char* name_;
  int64_t start_;
};

// Starts or stops recording. Returns what was recorded since the last call, "stage\tcalls\tnanoseconds\n" per stage in
// the order in which they first ran, and forgets it.
std::string record_stages(bool on);

}  // namespace sb
