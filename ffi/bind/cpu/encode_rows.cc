// The handler that encodes rows on a CPU.
#include "bind/encode_rows.h"

#include "bind/call_reader.h"
#include "bind/cpu/works.h"
#include "bind/handler_list.h"
#include "cpu/encode_rows.h"
#include "fabric/work/work_share.h"

namespace jax_ep {
namespace {

ffi::Error EncodeRows(ffi::ThreadPool pool, ffi::RemainingArgs operands,
                      ffi::RemainingRets results, ffi::Dictionary attributes) {
  BufferReader reader(operands, results, attributes);
  const EncodeRowsArgs args = ReadEncodeRows(reader);
  if (reader.failed()) return reader.error();
  RunTogether({cpu::EncodeRowsWork(args)}, ScheduleOn(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_ep

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_encode_rows, jax_ep::EncodeRows,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs());

EP_LIST_HANDLER(encode_rows, jax_ep::ReadEncodeRows, {"execute", "jax_ep_encode_rows"})
