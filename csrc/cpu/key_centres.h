// The points that states expand about (docs/algorithm.md, section 5): weighted means of a few keys' coordinates, where
// they lie so far from 0 that the features' terms would cancel.
#pragma once
#include "../params.h"

#include <vector>

namespace sb::cpu {

// Holds what the parameters point at.
template <class T>
struct KeyCentres {
  void set(AttentionParams& p);

 private:
  std::vector<T> rows;
};

}  // namespace sb::cpu
