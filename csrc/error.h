// SB_CHECK(condition, parts...) throws what Python sees as a RuntimeError whose message is the parts and nothing else.
// STD_TORCH_CHECK puts the function, file and line in front: a folder of the machine that compiled, which tells the
// caller nothing.
#pragma once
#include <sstream>
#include <stdexcept>

namespace sb {

template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(std::move(message).str());
}

}  // namespace sb

#define SB_CHECK(condition, ...)             \
  do {                                       \
    if (!(condition)) sb::fail(__VA_ARGS__); \
  } while (false)
