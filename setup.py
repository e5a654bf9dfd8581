"""Builds the optional C++ extension and CUDA library; metadata is in pyproject.toml.

LOWBIT_MUON_NO_EXTENSION=1 skips the extension. Without a working C++17 compiler (gcc or clang) the
install goes on and the package uses its reference backend. LOWBIT_MUON_CUDA=1 builds the CUDA
library, and the install fails where that fails; without it no library is built or kept.
LOWBIT_MUON_URL, a repository's address, is for package indexes (see `index_metadata`).
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from pybind11 import get_include
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.modified import newer_group

SOURCES = Path("csrc/cpu")
CUDA_SOURCES = Path("csrc/cuda")
# What the tests of a source distribution need beside the package.
TESTED = (".ci", ".github", "bench", "tests")
TESTED_FILES = (".clang-format", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile")
MADE = (".pyc", ".so")
CPU_EXTENSION = "lowbit_muon.backends._cpu"
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",  # false alarms inside gcc 12's AVX-512 headers
    "-Wno-psabi",  # vectors wider than the baseline's registers never cross an object file
    "-fvisibility=hidden",
    # No product is fused with a sum: results must not depend on the ISA level.
    "-ffp-contract=off",
    "-fno-math-errno",
    # Link-time inlining across ISA levels could move AVX-512 code into the baseline.
    "-fno-lto",
]
OPENMP_FLAG = "-fopenmp"
# csrc/cpu/isa.cpp asks the processor for these before it offers a level.
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512_FLAGS = [
    *AVX2_FLAGS,
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    "-mprefer-vector-width=512",
]
X86_LEVELS = {
    "avx2": AVX2_FLAGS,
    "avx512": AVX512_FLAGS,
    "avx512vnni": [*AVX512_FLAGS, "-mavx512vnni"],
}
# By itself, since gcc 9 does not know it.
BF16_LEVEL = {"avx512bf16": [*X86_LEVELS["avx512vnni"], "-mavx512bf16"]}
# Nor does gcc 10 know this one.
AMX_LEVEL = {"amx": [*BF16_LEVEL["avx512bf16"], "-mamx-tile", "-mamx-bf16", "-mamx-int8"]}
X86_PROBE = "#ifndef __x86_64__\n#error not x86-64\n#endif\n#include <immintrin.h>\n"
# Its registers are asked for as on Linux.
AMX_PROBE = X86_PROBE + "#include <sys/syscall.h>\nlong probe() { return SYS_arch_prctl; }\n"
OPENMP_PROBE = "#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n"


def cuda_rules() -> ModuleType:
    """lowbit_muon/backends/cuda/build.py; the package itself cannot be imported without torch."""
    path = Path("lowbit_muon/backends/cuda/build.py")
    spec = importlib.util.spec_from_file_location("cuda_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):
    """Compiles each ISA level with its own flags; where that fails, installs without them."""

    def run(self) -> None:
        rules = cuda_rules()
        nvcc = rules.requested_nvcc()
        super().run()
        output = Path(self.get_ext_fullpath(CPU_EXTENSION)).with_name(rules.LIBRARY_NAME)
        depends = [rules.__file__, *sorted(str(path) for path in CUDA_SOURCES.iterdir())]
        if nvcc is None:
            output.unlink(missing_ok=True)  # of an earlier install, perhaps of other sources
        elif self.force or newer_group(depends, str(output)):
            rules.build(nvcc, CUDA_SOURCES, output)

    def get_source_files(self) -> list[str]:
        """What a source distribution must hold."""
        return [*super().get_source_files(), *map(str, sorted(CUDA_SOURCES.iterdir()))]

    def build_extensions(self) -> None:
        for extension in list(self.extensions):
            reason = self._try_to_build(extension)
            if reason is not None:
                self.extensions.remove(extension)
                self.warn(
                    f"the C++ extension {extension.name} was not built ({reason}); lowbit_muon "
                    "will use its slower reference backend"
                )

    def _try_to_build(self, extension: Extension) -> str | None:
        """Why the extension could not be built, or None."""
        if os.environ.get("LOWBIT_MUON_NO_EXTENSION", "0") not in ("", "0"):
            return "LOWBIT_MUON_NO_EXTENSION is set"
        try:
            self.build_extension(extension)
        except Exception as error:  # each platform's compiler class fails in its own way
            return f"a C++17 compiler, gcc or clang, is needed: {error}"
        return None

    def build_extension(self, extension: Extension) -> None:
        path = self.get_ext_fullpath(extension.name)
        depends = [*extension.sources, *extension.depends]
        if not (self.force or newer_group(depends, path, missing="newer")):
            return
        openmp = [OPENMP_FLAG] if self._compiles(OPENMP_PROBE, [OPENMP_FLAG]) else []
        flags = [*FLAGS, *openmp]
        levels = {"baseline": []}
        # All levels or none: isa.cpp registers them together.
        if self._compiles(X86_PROBE, X86_LEVELS["avx512vnni"]):
            levels |= X86_LEVELS
            extension.define_macros = [("LOWBIT_X86_LEVELS", None)]
        if self._compiles(X86_PROBE, BF16_LEVEL["avx512bf16"]):
            levels |= BF16_LEVEL
            extension.define_macros.append(("LOWBIT_BF16_LEVEL", None))
        if self._compiles(AMX_PROBE, AMX_LEVEL["amx"]):
            levels |= AMX_LEVEL
            extension.define_macros.append(("LOWBIT_AMX_LEVEL", None))
        # All of pybind11's templates, none in a loop: -O3 takes a third longer and gains nothing.
        own_flags = {str(SOURCES / "bindings.cpp"): ["-O1"]}
        for level, level_flags in levels.items():
            own_flags[str(SOURCES / "kernels" / f"{level}.cpp")] = level_flags
        # Most of the time, so as many at once as there are processors.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = pool.map(
                lambda source: self.compiler.compile(
                    [source],
                    output_dir=self.build_temp,
                    include_dirs=extension.include_dirs,
                    extra_postargs=[*flags, *own_flags[source]],
                ),
                own_flags,
            )
        extension.extra_objects += itertools.chain(*objects)
        extension.extra_compile_args = flags
        extension.extra_link_args = openmp
        super().build_extension(extension)

    def _compiles(self, code: str, flags: list[str]) -> bool:
        """Whether the C++ compiler takes the code and the flags, and links the result."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(code)
            command = [*self.compiler.compiler_so_cxx, *flags, str(source)]
            output = str(Path(folder, "probe.so"))
            return (
                subprocess.run([*command, "-shared", "-o", output], capture_output=True).returncode
                == 0
            )


class SourceDistribution(sdist):
    """With everything that `make test` reads."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        tests = [
            str(path)
            for folder in TESTED
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and path.suffix not in MADE
        ]
        super().make_release_tree(base_dir, [*files, *filter(os.path.exists, TESTED_FILES), *tests])


def index_metadata() -> dict[str, Any]:
    """README as the long description, and the project's links.

    A package index shows README without the files beside it: where LOWBIT_MUON_URL names the
    repository on a forge (with GitHub's paths), links and pictures point to the version's tag
    there. Without it they stay relative, and no link is made up.
    """
    readme = Path("README.md").read_text(encoding="utf-8")
    url = os.environ.get("LOWBIT_MUON_URL", "").rstrip("/")
    links = {}
    if url:
        version = re.search(r'^version = "(.+)"$', Path("pyproject.toml").read_text(), re.MULTILINE)
        assert version is not None
        readme = with_absolute_links(readme, url, f"v{version[1]}")
        changes = f"{url}/blob/v{version[1]}/CHANGELOG.md"
        links = {"Source": url, "Issues": f"{url}/issues", "Changelog": changes}
    return {
        "long_description": readme,
        "long_description_content_type": "text/markdown",
        "project_urls": links,
    }


def with_absolute_links(markdown: str, url: str, revision: str) -> str:
    """Relative targets as addresses in a repository; anchors and addresses stay as they are."""

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link["picture"] else "blob"
        return f"{link['picture']}[{link['text']}]({url}/{kind}/{revision}/{link['target']})"

    relative = r"(?P<picture>!?)\[(?P<text>[^]]*)\]\((?!#|[a-z]+:)(?P<target>[^)\s]+)\)"
    return re.sub(relative, absolute, markdown)


if __name__ == "__main__":  # bench/chains.py reads the flags
    setup(
        ext_modules=[
            Extension(
                CPU_EXTENSION,
                sources=[
                    str(SOURCES / name)
                    for name in (
                        "codec.cpp",
                        "integer_product.cpp",
                        "inverse.cpp",
                        "isa.cpp",
                        "narrow_product.cpp",
                        "product.cpp",
                    )
                ],
                depends=["setup.py"]
                + [str(path) for path in sorted(SOURCES.glob("**/*")) if path.is_file()],
                include_dirs=[get_include()],
                language="c++",
            )
        ],
        cmdclass={"build_ext": BuildKernels, "sdist": SourceDistribution},
        **index_metadata(),
    )
