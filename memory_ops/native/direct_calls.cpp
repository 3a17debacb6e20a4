// The operations of decoding called with tensors as they are: checks in Python, and telling ctypes
// what they are, takes as long as reading half the rows of one token. It is a Python module, and the
// only code here that knows Python; the kernels it calls are those of interface.h, given by their
// addresses. What it declines, by returning None, takes the long way.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <initializer_list>

#include "dlpack.h"

namespace {

using memplus::dlpack::Exchange;
using memplus::dlpack::View;

const Exchange* exchange;
PyObject *tensor_type, *parameter_type;

// Whether a tensor is nothing but its values: no subclass, no gradient wanted, no lazy negation.
bool is_plain(PyObject* tensor, bool needs_grad) {
  const auto* type = (PyObject*)Py_TYPE(tensor);
  if (type != tensor_type && type != parameter_type) return false;
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  const auto is_false = [](PyObject* found) {
    Py_XDECREF(found);  // True and False stay
    return found == Py_False;
  };
  return (!needs_grad || is_false(PyObject_GetAttr(tensor, requires_grad))) &&
         is_false(PyObject_CallMethodNoArgs(tensor, is_neg));
}

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

bool has_shape(const View& view, std::initializer_list<int64_t> sizes) {
  return view.ndim == (int32_t)sizes.size() && std::equal(sizes.begin(), sizes.end(), view.shape);
}

// Views of `count` plain tensors on the CPU.
bool view_all(PyObject* const* tensors, int count, bool needs_grad, View* views) {
  for (int i = 0; i < count; i++) {
    if (!is_plain(tensors[i], needs_grad) || exchange->view(tensors[i], &views[i])) return false;
    if (views[i].device.type != memplus::dlpack::CPU || !views[i].strides) return false;
    views[i].data = (uint8_t*)views[i].data + views[i].byte_offset;
  }
  return true;
}

PyObject* declined() {
  PyErr_Clear();  // whoever checks the arguments one by one says it better
  Py_RETURN_NONE;
}

void set_error(void*, const char*, const char* message) {
  PyErr_SetString(PyExc_RuntimeError, message);
}

// A new tensor on the CPU that is not written yet; null with an exception set.
struct Empty {
  PyObject* object = nullptr;
  void* data = nullptr;

  Empty() = default;
  Empty(uint8_t code, uint8_t bits, std::initializer_list<int64_t> sizes) {
    int64_t shape[3];
    std::copy(sizes.begin(), sizes.end(), shape);
    View like = {nullptr, {memplus::dlpack::CPU, 0}, (int32_t)sizes.size(), {code, bits, 1},
                 shape,   nullptr,                   0};
    memplus::dlpack::Owned* owned;
    if (exchange->allocate(&like, &owned, nullptr, set_error)) return;
    data = owned->tensor.data;
    if (exchange->to_object(owned, (void**)&object)) object = nullptr;
  }
};

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
  View views[3];
  const auto& [table, ids, weights] = views;
  if (!kernel || !view_all(arguments + 3, 3, arguments[1] == Py_True, views)) return declined();
  Rows rows;
  if (table.ndim != 2 || table.strides[1] != 1 || ids.ndim != 3) return declined();
  if (!(arguments[2] == Py_None ? plain_rows(table, &rows)
                                : record_rows(table, arguments[2], &rows)))
    return declined();
  const int64_t tokens = ids.shape[0], per_token = ids.shape[1] * ids.shape[2];
  if (!is_ids(ids) || !is_float(weights) ||
      !has_shape(weights, {tokens, ids.shape[1], ids.shape[2]}))
    return declined();
  const Empty out(memplus::dlpack::FLOAT, 32, {tokens, rows.value_dim});
  if (!out.object) return nullptr;
  const auto* given = (const int64_t*)ids.data;
  const int64_t num_rows = table.shape[0];
  int64_t wrong;
  Py_BEGIN_ALLOW_THREADS;
  wrong = kernel(table.data, num_rows, rows.stride, rows.value_dim, rows.scale_offset, rows.format,
                 given, (const float*)weights.data, tokens, per_token, (float*)out.data);
  Py_END_ALLOW_THREADS;
  if (wrong < 0) return out.object;
  Py_DECREF(out.object);
  return PyErr_Format(PyExc_IndexError, "rows: %lld is outside [0, %lld)", (long long)given[wrong],
                      (long long)num_rows);
}

PyObject* product_topk(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 5) return PyErr_Format(PyExc_TypeError, "product_topk takes 5 arguments");
  using Kernel = void (*)(const float*, int64_t, int32_t, int32_t, int64_t*, float*);
  const auto kernel = (Kernel)PyLong_AsVoidPtr(arguments[0]);
  int most_subkeys, most_chosen;
  View scores;
  if (!kernel || !view_all(arguments + 3, 1, arguments[1] == Py_True, &scores) ||
      !PyArg_ParseTuple(arguments[2], "ii", &most_subkeys, &most_chosen))
    return declined();
  const long top_k = PyLong_AsLong(arguments[4]);
  if (!is_float(scores) || scores.ndim != 4 || scores.shape[2] != 2) return declined();
  const int64_t tokens = scores.shape[0], heads = scores.shape[1], num_subkeys = scores.shape[3];
  if (num_subkeys > most_subkeys || top_k > std::min<int64_t>(num_subkeys, most_chosen) ||
      top_k < 1)
    return declined();
  PyObject* both = PyTuple_New(2);
  if (!both) return nullptr;
  const Empty rows(memplus::dlpack::INT, 64, {tokens, heads, top_k});
  if (rows.object) PyTuple_SET_ITEM(both, 0, rows.object);
  const Empty weights = rows.object ? Empty(memplus::dlpack::FLOAT, 32, {tokens, heads, top_k})
                                    : Empty();
  if (!weights.object) {
    Py_DECREF(both);
    return nullptr;
  }
  PyTuple_SET_ITEM(both, 1, weights.object);
  Py_BEGIN_ALLOW_THREADS;
  kernel((const float*)scores.data, tokens * heads, (int32_t)num_subkeys, (int32_t)top_k,
         (int64_t*)rows.data, (float*)weights.data);
  Py_END_ALLOW_THREADS;
  return both;
}

// Finds torch's types and exchange; false where this torch has none of this version.
bool find_torch() {
  PyObject* torch = PyImport_ImportModule("torch");
  tensor_type = torch ? PyObject_GetAttrString(torch, "Tensor") : nullptr;
  PyObject* nn = tensor_type ? PyObject_GetAttrString(torch, "nn") : nullptr;
  parameter_type = nn ? PyObject_GetAttrString(nn, "Parameter") : nullptr;
  PyObject* capsule =
      parameter_type ? PyObject_GetAttrString(tensor_type, Exchange::attribute) : nullptr;
  Py_XDECREF(torch);
  Py_XDECREF(nn);
  if (!capsule) return false;
  // it lives as long as the type does
  exchange = (const Exchange*)PyCapsule_GetPointer(capsule, Exchange::capsule);
  Py_DECREF(capsule);
  return exchange && exchange->version.major == Exchange::major && exchange->view;
}

PyMethodDef methods[] = {
    {"gather_rows", (PyCFunction)(void (*)())gather_rows, METH_FASTCALL,
     "gather_rows(kernel, needs_grad, record, table, rows, weights) -> out, or None\n\n"
     "`record` is None, or the format, value_dim and scale_offset of records.\n"
     "Raises IndexError: a row id is outside the table."},
    {"product_topk", (PyCFunction)(void (*)())product_topk, METH_FASTCALL,
     "product_topk(kernel, needs_grad, most, scores, top_k) -> rows and weights, or None\n\n"
     "`most` are how many subkeys and rows a head the kernel takes."},
    {}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "direct_calls", nullptr, -1, methods,
                      nullptr,               nullptr,        nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_direct_calls() {
  if (find_torch()) return PyModule_Create(&module);
  PyErr_Clear();
  PyErr_SetString(PyExc_ImportError, "this torch does not exchange tensors by DLPack 1");
  return nullptr;
}
