// Reads tensors in C without torch's headers, through DLPack's exchange API: a table of C functions of the tensor class
// (torch 2.10 and later). That takes some 30 ns per tensor; to read the five attributes in Python takes 300.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "args.h"

namespace pyzero {

// The part of dlpack.h (1.3) that is used here.
namespace dlpack {

struct Device {
  int32_t type, id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void (*unused[3])();
  int (*tensor_from_py_object)(void* object, Tensor* out);  // `out` borrows; -1 and a Python error on failure
  void (*unused_too)();
};

constexpr uint32_t kMajor = 1;
enum TypeCode : uint8_t { kFloat = 2, kBFloat = 4 };

}  // namespace dlpack

// One row of ops/rows.py.
struct Row {
  int64_t address;
  int64_t numel;
  int64_t dtype;
};

// Further checks, numbered as in ops/rows.py. Every list must be contiguous, of the three dtypes and on one device.
enum RowRule : int {
  kFlat = 1,        // all 1-D, of one numel
  kApart = 2,       // no two share memory
  kFirstApart = 4,  // the first shares memory with no other
  kOneDtype = 8,    // all but the first are of one dtype
  kAligned = 16,    // all start at a multiple of 16 bytes
};

class RowReader {
 public:
  // Returns false if this torch has no exchange API of a known version. Tensor subclasses other than Parameter are left
  // to Python, which asks their __torch_function__.
  bool use(pybind11::handle tensor_type, pybind11::handle parameter_type) {
    PyObject* capsule = PyObject_GetAttrString(tensor_type.ptr(), "__dlpack_c_exchange_api__");
    void* found = capsule != nullptr ? PyCapsule_GetPointer(capsule, kCapsuleName) : nullptr;
    Py_XDECREF(capsule);
    PyErr_Clear();
    const auto* api = static_cast<const dlpack::ExchangeApi*>(found);
    if (api == nullptr || api->major != dlpack::kMajor || api->tensor_from_py_object == nullptr) return false;
    api_ = api;
    tensor_type_ = reinterpret_cast<PyTypeObject*>(tensor_type.ptr());
    parameter_type_ = reinterpret_cast<PyTypeObject*>(parameter_type.ptr());
    return true;
  }

  // Returns the rows of a list or tuple as bytes, or None if a check fails. Python then finds out which.
  pybind11::object read(pybind11::handle tensors, int num_fp32, int rules) {
    if (!PyList_Check(tensors.ptr()) && !PyTuple_Check(tensors.ptr())) return pybind11::none();
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(tensors.ptr());
    PyObject** items = PySequence_Fast_ITEMS(tensors.ptr());
    rows_.resize(size_t(count));
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (!read_one(items[i], i, i < num_fp32, rules)) return pybind11::none();
    }
    if ((rules & kApart) && !all_apart()) return pybind11::none();
    if ((rules & kFirstApart) && !first_apart()) return pybind11::none();
    return as_bytes();
  }

  // Returns the rows of a shard, then those of the gradients that lie at `offsets` in it, or None if a check fails. The
  // shard must satisfy kFlat and kAligned. The gradients must have one dtype. No two of all these may share memory.
  pybind11::object read_shard(pybind11::tuple shard, int num_fp32, pybind11::list grads, pybind11::list offsets) {
    const size_t num_shard = shard.size(), num_grads = grads.size();
    if (num_shard == 0 || num_grads == 0 || offsets.size() != num_grads) return pybind11::none();
    rows_.resize(num_shard + num_grads);
    for (size_t i = 0; i < num_shard; ++i) {
      PyObject* item = PyTuple_GET_ITEM(shard.ptr(), Py_ssize_t(i));
      if (!read_one(item, Py_ssize_t(i), int(i) < num_fp32, kFlat | kAligned)) return pybind11::none();
    }
    int64_t end = 0;
    for (size_t i = 0; i < num_grads; ++i) {
      const Row& row = rows_[num_shard + i];
      PyObject* item = PyList_GET_ITEM(grads.ptr(), Py_ssize_t(i));
      if (!read_one(item, Py_ssize_t(num_shard + i), false, 0)) return pybind11::none();
      const int64_t offset = PyLong_AsLongLong(PyList_GET_ITEM(offsets.ptr(), Py_ssize_t(i)));
      if (offset == -1 && PyErr_Occurred()) return PyErr_Clear(), pybind11::none();
      if (offset < end || offset % kSegmentGranule != 0) return pybind11::none();
      if (row.dtype != rows_[num_shard].dtype) return pybind11::none();
      end = offset + row.numel;
    }
    if (end > rows_[0].numel || !all_apart()) return pybind11::none();
    return as_bytes();
  }

  // Returns address, device, dtype, shape and strides of each tensor as bytes, or None if one is not a plain tensor.
  pybind11::object layouts(pybind11::list tensors) {
    layouts_.clear();
    for (pybind11::handle item : tensors) {
      dlpack::Tensor tensor;
      if (!borrow(item.ptr(), &tensor)) return pybind11::none();
      const dlpack::DataType dtype = tensor.dtype;
      layouts_.insert(layouts_.end(), {address_of(tensor), tensor.device.type, tensor.device.id, dtype.code, dtype.bits,
                                       dtype.lanes, tensor.ndim});
      layouts_.insert(layouts_.end(), tensor.shape, tensor.shape + tensor.ndim);
      layouts_.insert(layouts_.end(), tensor.strides, tensor.strides + tensor.ndim);
    }
    return pybind11::bytes(reinterpret_cast<const char*>(layouts_.data()), layouts_.size() * sizeof(int64_t));
  }

 private:
  static constexpr const char* kCapsuleName = "dlpack_exchange_api";

  // Returns false if the item is neither a Tensor nor a Parameter, or has no dense memory (a sparse tensor).
  bool borrow(PyObject* item, dlpack::Tensor* tensor) {
    if (Py_TYPE(item) != tensor_type_ && Py_TYPE(item) != parameter_type_) return false;
    if (api_->tensor_from_py_object(item, tensor) == 0) return true;
    PyErr_Clear();
    return false;
  }

  pybind11::bytes as_bytes() const {
    return pybind11::bytes(reinterpret_cast<const char*>(rows_.data()), rows_.size() * sizeof(Row));
  }

  static int64_t address_of(const dlpack::Tensor& tensor) {
    return int64_t(reinterpret_cast<uintptr_t>(tensor.data)) + int64_t(tensor.byte_offset);
  }

  bool read_one(PyObject* item, Py_ssize_t index, bool must_be_fp32, int rules) {
    dlpack::Tensor tensor;
    if (!borrow(item, &tensor)) return false;
    Row& row = rows_[size_t(index)];
    row.address = address_of(tensor);
    if (!contiguous_numel(tensor, &row.numel) || !dtype_code(tensor.dtype, &row.dtype)) return false;
    if (tensor.data == nullptr && row.numel > 0) return false;  // its storage was freed

    if (index == 0) device_ = tensor.device;
    if (tensor.device.type != device_.type || tensor.device.id != device_.id) return false;
    if (must_be_fp32 && row.dtype != int64_t(DType::kFloat32)) return false;
    if ((rules & kFlat) && (tensor.ndim != 1 || row.numel != rows_[0].numel)) return false;
    if ((rules & kAligned) && row.address % 16 != 0) return false;
    return !(rules & kOneDtype) || index < 2 || row.dtype == rows_[1].dtype;
  }

  static bool contiguous_numel(const dlpack::Tensor& tensor, int64_t* numel) {
    bool contiguous = true;
    *numel = 1;
    for (int d = tensor.ndim - 1; d >= 0; --d) {
      if (tensor.shape[d] != 1 && tensor.strides[d] != *numel) contiguous = false;
      *numel *= tensor.shape[d];
    }
    return contiguous || *numel == 0;
  }

  static bool dtype_code(const dlpack::DataType& dtype, int64_t* code) {
    if (dtype.lanes != 1) return false;
    if (dtype.code == dlpack::kFloat && dtype.bits == 32) return *code = int64_t(DType::kFloat32), true;
    if (dtype.code == dlpack::kBFloat && dtype.bits == 16) return *code = int64_t(DType::kBFloat16), true;
    if (dtype.code == dlpack::kFloat && dtype.bits == 16) return *code = int64_t(DType::kFloat16), true;
    return false;
  }

  static int64_t end_of(const Row& row) {
    return row.address + row.numel * element_size(static_cast<DType>(row.dtype));
  }

  // Starts and ends may be sorted separately: the spans are disjoint if and only if each sorted end is at most the next
  // sorted start.
  bool all_apart() {
    starts_.clear();
    ends_.clear();
    for (const Row& row : rows_) {
      if (row.numel == 0) continue;
      starts_.push_back(row.address);
      ends_.push_back(end_of(row));
    }
    std::sort(starts_.begin(), starts_.end());
    std::sort(ends_.begin(), ends_.end());
    for (size_t i = 1; i < starts_.size(); ++i) {
      if (starts_[i] < ends_[i - 1]) return false;
    }
    return true;
  }

  bool first_apart() const {
    return std::none_of(rows_.begin() + 1, rows_.end(), [this](const Row& row) {
      return row.numel > 0 && row.address < end_of(rows_[0]) && end_of(row) > rows_[0].address;
    });
  }

  const dlpack::ExchangeApi* api_ = nullptr;
  PyTypeObject* tensor_type_ = nullptr;  // borrowed: torch keeps its classes alive
  PyTypeObject* parameter_type_ = nullptr;
  dlpack::Device device_{};
  std::vector<Row> rows_;  // reused by every call, under the GIL
  std::vector<int64_t> starts_, ends_, layouts_;
};

inline RowReader& row_reader() {
  static RowReader reader;
  return reader;
}

}  // namespace pyzero
