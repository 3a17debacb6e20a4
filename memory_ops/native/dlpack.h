// What is used of DLPack 1.3's C exchange (dmlc.github.io/dlpack): tensors of any library as plain
// data, by functions that the tensor's type hands out as a capsule.
#pragma once

#include <cstdint>

namespace memplus::dlpack {

enum DeviceType : int32_t { CPU = 1 };
enum DtypeCode : uint8_t { INT = 0, UINT = 1, FLOAT = 2, BFLOAT = 4 };

struct Device {
  int32_t type, id;
};

struct Dtype {
  uint8_t code, bits;
  uint16_t lanes;
};

// Shape and strides, in elements, stay the tensor's own.
struct View {
  void* data;
  Device device;
  int32_t ndim;
  Dtype dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct Version {
  uint32_t major, minor;
};

struct Owned {
  Version version;
  void* owner;
  void (*release)(Owned*);
  uint64_t flags;
  View tensor;
};

using SetError = void (*)(void* context, const char* kind, const char* message);

// All return 0, or -1 with a Python exception set.
struct Exchange {
  static constexpr const char* attribute = "__dlpack_c_exchange_api__";
  static constexpr const char* capsule = "dlpack_exchange_api";
  static constexpr uint32_t major = 1;

  Version version;
  Exchange* older;
  int (*allocate)(View* like, Owned** owned, void* context, SetError set_error);
  int (*from_object)(void* object, Owned** owned);
  int (*to_object)(Owned* owned, void** object);  // which owns it then
  int (*view)(void* object, View* view);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

}  // namespace memplus::dlpack
