// Who accessed a byte last, and whether another access is ordered after it.
#pragma once
#include <vector>

#include "program.h"

namespace ptx {

struct Mark {
  int32_t block = -1, block_epoch = 0, warp_epoch = 0;
  int16_t thread = -1, crowd = 0;  // 0: one thread; 1: lanes of a warp; 2: warps of a block; 3: blocks
};
struct Byte {
  Mark write, read;
  int16_t copies = 0;  // of those that are under way, how many read it
};
struct Now {
  int32_t block, thread, block_epoch, warp_epoch;
};
// The bytes of a buffer, by pages that are made when a thread comes.
class Shadow {
 public:
  Byte& at(uint64_t x) {
    if (x / kPage >= pages.size()) pages.resize(x / kPage + 1);
    std::vector<Byte>& page = pages[x / kPage];
    if (page.empty()) page.resize(kPage);
    return page[x % kPage];
  }

 private:
  static constexpr uint64_t kPage = 512;
  std::vector<std::vector<Byte>> pages;
};

inline bool is_ordered(const Mark& mark, const Now& now) {
  if (mark.thread < 0) return true;
  if (mark.block != now.block || mark.crowd == 3) return false;
  if (mark.block_epoch != now.block_epoch) return true;
  if (mark.thread / kWarp != now.thread / kWarp || mark.crowd == 2) return false;
  return mark.warp_epoch != now.warp_epoch || (mark.thread == now.thread && mark.crowd == 0);
}
inline void note(Mark& mark, const Now& now) {
  int16_t crowd = 0;
  if (mark.thread >= 0) {
    if (mark.block != now.block || mark.crowd == 3)
      crowd = 3;
    else if (mark.block_epoch == now.block_epoch) {
      if (mark.thread / kWarp != now.thread / kWarp || mark.crowd == 2)
        crowd = 2;
      else if (mark.warp_epoch == now.warp_epoch && (mark.thread != now.thread || mark.crowd == 1))
        crowd = 1;
    }
  }
  mark = {now.block, now.block_epoch, now.warp_epoch, int16_t(now.thread), crowd};
}

}  // namespace ptx
