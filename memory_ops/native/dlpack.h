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

struct Exchange {
  static constexpr const char* attribute = "__dlpack_c_exchange_api__";
  static constexpr const char* capsule = "dlpack_exchange_api";
  static constexpr uint32_t major = 1;

  Version version;
  Exchange* older;
  void *allocate, *from_object, *to_object;
  int (*view)(void* object, View* view);  // 0, or -1 with a Python exception set
  void* current_stream;
};

}  // namespace memplus::dlpack
