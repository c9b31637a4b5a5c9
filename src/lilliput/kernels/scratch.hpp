// Room that a thread keeps from call to call.
#pragma once

#include <cstdint>
#include <vector>

namespace lilliput {

/// At least `count` values that nobody else uses; `Owner`, a type of the caller's, tells its uses apart.
template <class T, class Owner>
T* scratch(int64_t count) {
  thread_local std::vector<T> room;
  if (static_cast<int64_t>(room.size()) < count) room.resize(count);
  return room.data();
}

}  // namespace lilliput
