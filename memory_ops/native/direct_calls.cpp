// The operations of decoding called with tensors as they are: ctypes and what it must be told take
// as long as reading half the rows of one token. It is a Python module, and the only code here that
// knows Python; the kernels it calls are those of interface.h, given by their addresses.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <initializer_list>

#include "dlpack.h"

namespace {

using memplus::dlpack::Exchange;
using memplus::dlpack::View;

const Exchange* exchange;

bool is(const View& view, uint8_t code, uint8_t bits) {
  return view.dtype.code == code && view.dtype.bits == bits && view.dtype.lanes == 1;
}

bool is_packed(const View& view) {
  int64_t step = 1;
  for (int axis = view.ndim; axis-- > 0; step *= view.shape[axis])
    if (view.shape[axis] > 1 && view.strides[axis] != step) return false;
  return true;
}

bool is_float(const View& view) { return is(view, memplus::dlpack::FLOAT, 32) && is_packed(view); }
bool is_ids(const View& view) { return is(view, memplus::dlpack::INT, 64) && is_packed(view); }

bool have_shape(std::initializer_list<const View*> views, std::initializer_list<int64_t> shape) {
  for (const View* view : views) {
    if (view->ndim != (int32_t)shape.size()) return false;
    const int64_t* size = view->shape;
    for (int64_t expected : shape)
      if (*size++ != expected) return false;
  }
  return true;
}

// Views of `count` tensors on the CPU; false where one is elsewhere, or nowhere.
bool view_all(PyObject* const* tensors, int count, View* views) {
  for (int i = 0; i < count; i++) {
    if (exchange->view(tensors[i], &views[i])) {
      PyErr_Clear();  // whoever checks the arguments one by one says it better
      return false;
    }
    const bool is_here = views[i].device.type == memplus::dlpack::CPU && views[i].strides;
    if (!is_here) return false;
    views[i].data = (uint8_t*)views[i].data + views[i].byte_offset;
  }
  return true;
}

PyObject* unfit() { return PyErr_Occurred() ? nullptr : Py_NewRef(Py_False); }

// How the rows of a table lie: what interface.h calls row_stride, value_dim, scale_offset, format.
struct Rows {
  int64_t stride, value_dim, scale_offset;
  int32_t format;
};

bool plain_rows(const View& table, Rows* rows) {
  constexpr uint8_t codes[] = {memplus::dlpack::FLOAT, memplus::dlpack::FLOAT,
                               memplus::dlpack::BFLOAT};
  constexpr uint8_t bits[] = {32, 16, 16};
  for (int32_t format = 0; format < 3; format++)
    if (is(table, codes[format], bits[format])) {
      *rows = {table.strides[0] * bits[format] / 8, table.shape[1], 0, format};
      return true;
    }
  return false;
}

bool record_rows(const View& table, PyObject* record, Rows* rows) {
  if (!is(table, memplus::dlpack::UINT, 8)) return false;
  long long value_dim, scale_offset;
  if (!PyArg_ParseTuple(record, "iLL", &rows->format, &value_dim, &scale_offset)) return false;
  rows->stride = table.strides[0];
  rows->value_dim = value_dim, rows->scale_offset = scale_offset;
  return true;
}

PyObject* gather_rows(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 6) return PyErr_Format(PyExc_TypeError, "gather_rows takes 6 arguments");
  using Kernel = int64_t (*)(const void*, int64_t, int64_t, int64_t, int64_t, int32_t,
                             const int64_t*, const float*, int64_t, int64_t, float*);
  const auto kernel = (Kernel)PyLong_AsVoidPtr(arguments[0]);
  View views[4];
  const auto& [table, ids, weights, out] = views;
  if (!kernel || !view_all(arguments + 2, 4, views)) return unfit();
  Rows rows;
  if (table.ndim != 2 || table.strides[1] != 1 || ids.ndim != 3) return unfit();
  if (!(arguments[1] == Py_None ? plain_rows(table, &rows)
                                : record_rows(table, arguments[1], &rows)))
    return unfit();
  const int64_t tokens = ids.shape[0], per_token = ids.shape[1] * ids.shape[2];
  if (!is_ids(ids) || !is_float(weights) || !is_float(out) ||
      !have_shape({&weights}, {tokens, ids.shape[1], ids.shape[2]}) ||
      !have_shape({&out}, {tokens, rows.value_dim}))
    return unfit();
  const auto* given = (const int64_t*)ids.data;
  const int64_t num_rows = table.shape[0];
  int64_t wrong;
  Py_BEGIN_ALLOW_THREADS;
  wrong = kernel(table.data, num_rows, rows.stride, rows.value_dim, rows.scale_offset, rows.format,
                 given, (const float*)weights.data, tokens, per_token, (float*)out.data);
  Py_END_ALLOW_THREADS;
  if (wrong >= 0)
    return PyErr_Format(PyExc_IndexError, "rows: %lld is outside [0, %lld)",
                        (long long)given[wrong], (long long)num_rows);
  Py_RETURN_TRUE;
}

PyObject* product_topk(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4) return PyErr_Format(PyExc_TypeError, "product_topk takes 4 arguments");
  using Kernel = void (*)(const float*, int64_t, int32_t, int32_t, int64_t*, float*);
  const auto kernel = (Kernel)PyLong_AsVoidPtr(arguments[0]);
  View views[3];
  const auto& [scores, ids, weights] = views;
  if (!kernel || !view_all(arguments + 1, 3, views)) return unfit();
  if (scores.ndim != 4 || scores.shape[2] != 2 || ids.ndim != 3) return unfit();
  const int64_t heads = scores.shape[0] * scores.shape[1], top_k = ids.shape[2];
  if (!is_float(scores) || !is_ids(ids) || !is_float(weights) ||
      !have_shape({&ids, &weights}, {scores.shape[0], scores.shape[1], top_k}) || top_k < 1 ||
      top_k > scores.shape[3])
    return unfit();
  Py_BEGIN_ALLOW_THREADS;
  kernel((const float*)scores.data, heads, (int32_t)scores.shape[3], (int32_t)top_k,
         (int64_t*)ids.data, (float*)weights.data);
  Py_END_ALLOW_THREADS;
  Py_RETURN_TRUE;
}

// Finds torch's exchange; false, with an exception set, where this torch has none of this version.
bool find_exchange() {
  PyObject* torch = PyImport_ImportModule("torch");
  PyObject* tensor = torch ? PyObject_GetAttrString(torch, "Tensor") : nullptr;
  PyObject* capsule = tensor ? PyObject_GetAttrString(tensor, Exchange::attribute) : nullptr;
  Py_XDECREF(torch);
  Py_XDECREF(tensor);
  if (!capsule) return false;
  // it lives as long as the type does
  exchange = (const Exchange*)PyCapsule_GetPointer(capsule, Exchange::capsule);
  Py_DECREF(capsule);
  if (exchange && exchange->version.major != Exchange::major) {
    PyErr_SetString(PyExc_ImportError, "torch exchanges tensors by another major version of DLPack");
    return false;
  }
  return exchange;
}

PyMethodDef methods[] = {
    {"gather_rows", (PyCFunction)(void (*)())gather_rows, METH_FASTCALL,
     "gather_rows(kernel, record, table, rows, weights, out) -> whether it was done\n\n"
     "False where a tensor is not as the kernel takes it. `record` is None, or a record's format,\n"
     "value_dim and scale_offset. Raises IndexError: a row id is outside the table."},
    {"product_topk", (PyCFunction)(void (*)())product_topk, METH_FASTCALL,
     "product_topk(kernel, scores, rows, weights) -> whether it was done"},
    {}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "direct_calls", nullptr, -1, methods,
                      nullptr,               nullptr,        nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_direct_calls() {
  return find_exchange() ? PyModule_Create(&module) : nullptr;
}
