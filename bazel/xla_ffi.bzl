"""The headers of XLA's FFI, out of the jaxlib of the Python that JAX_EP_PYTHON names."""

_BUILD = """
load("@rules_cc//cc:defs.bzl", "cc_library")

cc_library(
    name = "headers",
    hdrs = glob(["include/**/*.h"]),
    includes = ["include"],
    visibility = ["//visibility:public"],
)
"""

def _xla_ffi_impl(ctx):
    python = ctx.os.environ.get("JAX_EP_PYTHON") or ctx.which("python3")
    found = ctx.execute([python, "-c", "import jax; print(jax.ffi.include_dir())"])
    if found.return_code:
        fail("JAX_EP_PYTHON must be a Python with jax; {} says: {}".format(python, found.stderr))
    ctx.symlink(found.stdout.strip(), "include")
    ctx.file("BUILD", _BUILD)

xla_ffi = repository_rule(
    implementation = _xla_ffi_impl,
    environ = ["JAX_EP_PYTHON"],
    local = True,
)
