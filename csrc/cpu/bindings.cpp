// lowbit_muon.backends._cpu: everything Python can call. Registration only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "codec.hpp"
#include "isa.hpp"
#include "product.hpp"

namespace py = pybind11;
using py::arg;
using release_gil = py::call_guard<py::gil_scoped_release>;

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of lowbit_muon; pointers are integers, see csrc/cpu/codec.hpp.";

    m.def("quantize", &lowbit::quantize, release_gil(), py::kw_only(), arg("rows"), arg("columns"),
          arg("x"), arg("x_stride"), arg("statistic"), arg("clip"), arg("bits"), arg("block_size"),
          arg("thresholds"), arg("threshold_count"), arg("packed"), arg("row_bytes"), arg("scales"),
          arg("threads"));
    m.def("accumulate", &lowbit::accumulate, release_gil(), py::kw_only(), arg("batch"),
          arg("rows"), arg("columns"), arg("buffer"), arg("buffer_stride"), arg("buffer_weight"),
          arg("bits") = 0, arg("block_size") = 0, arg("levels") = 0, arg("level_count") = 0,
          arg("packed") = 0, arg("row_bytes") = 0, arg("scales") = 0, arg("code_weight") = 1.0f,
          arg("grad") = lowbit::Matrices(), arg("grad_type") = "float32", arg("grad_weight") = 1.0f,
          arg("row_sums"), arg("threads"));

    m.def("rotate", &lowbit::rotate, release_gil(), py::kw_only(), arg("rows"), arg("columns"),
          arg("x"), arg("x_stride"), arg("first_signs"), arg("second_signs"), arg("inverse"),
          arg("threads"));

    m.def("product", &lowbit::product, release_gil(), py::kw_only(), arg("batch"), arg("rows"),
          arg("columns"), arg("depth"), arg("a"), arg("b"), arg("c"), arg("alphas"), arg("alpha"),
          arg("beta"), arg("rounded") = false, arg("a_diagonal") = std::nullopt,
          arg("b_diagonal") = std::nullopt, arg("threads"));
    m.def("symmetric_product", &lowbit::symmetric_product, release_gil(), py::kw_only(),
          arg("batch"), arg("size"), arg("depth"), arg("a"), arg("b"), arg("addend"), arg("out"),
          arg("alpha"), arg("beta"), arg("rounded") = false, arg("threads"));
    m.def("add_inverses", &lowbit::add_inverses, release_gil(), py::kw_only(), arg("batch"),
          arg("size"), arg("x"), arg("count"), arg("shifts"), arg("weights"), arg("out"),
          arg("together"), arg("workspace"), arg("threads"));
    m.def("inverse_floats", &lowbit::inverse_floats, arg("size"));
    m.def("code_gram", &lowbit::code_gram, release_gil(), py::kw_only(), arg("batch"), arg("rows"),
          arg("columns"), arg("bits"), arg("levels"), arg("packed"), arg("row_bytes"),
          arg("scales"), arg("block_size"), arg("out"), arg("threads"));
    m.def("code_product", &lowbit::code_product, release_gil(), py::kw_only(), arg("batch"),
          arg("out_rows"), arg("rows"), arg("columns"), arg("bits"), arg("levels"), arg("packed"),
          arg("row_bytes"), arg("scales"), arg("a"), arg("out"), arg("beta"), arg("threads"));
    m.def("code_times", &lowbit::code_times, release_gil(), py::kw_only(), arg("batch"),
          arg("out_columns"), arg("rows"), arg("columns"), arg("bits"), arg("levels"),
          arg("packed"), arg("row_bytes"), arg("scales"), arg("v"), arg("out"), arg("threads"));

    m.def("take_most_workspace", &lowbit::take_most_workspace);

    m.def("has_rounded_products", &lowbit::has_rounded_products);
    m.def("isa", &lowbit::current_isa);
    m.def("supported_isas", &lowbit::supported_isas);
    m.def("set_isa", &lowbit::set_isa, arg("name"));
}
