#include "launchers.h"

#include <array>

#include "error.h"

namespace sb {
namespace {

constexpr size_t kDevices = size_t(torch::headeronly::COMPILE_TIME_MAX_DEVICE_TYPES);

std::array<Launchers*, kDevices>& tables() {
  static std::array<Launchers*, kDevices> all{};
  return all;
}

std::string name_of(DeviceType device) {
  switch (device) {
#define SB_DEVICE_NAME(type, _) \
  case DeviceType::type: return #type;
    C10_FORALL_BACKEND_DEVICE_TYPES(SB_DEVICE_NAME, _)
#undef SB_DEVICE_NAME
    default: return "device type " + std::to_string(int(device));
  }
}

std::string registered_names() {
  std::string names;
  for (size_t i = 0; i < kDevices; ++i)
    if (tables()[i]) names += (names.empty() ? "" : ", ") + name_of(DeviceType(i));
  return names;
}

}  // namespace

Launchers& launchers(DeviceType device) {
  Launchers* const table = tables()[size_t(device)];
  SB_CHECK(table, "scatterbrain: expected tensors on a device that this build has kernels for (", registered_names(),
           "), got ", name_of(device), "; move the tensors there, or install a build with kernels for ",
           name_of(device),
           device == DeviceType::CUDA ? " (FORCE_CUDA=1 pip install . says what is missing for it)" : "");
  return *table;
}

void register_launchers(DeviceType device, Launchers& table) { tables()[size_t(device)] = &table; }

}  // namespace sb
