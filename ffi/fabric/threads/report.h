// What the library says on stderr: failures, and what it was asked to log.
// Used by meeting points and channels, and by the log of calls.

#ifndef JAX_EP_FFI_FABRIC_THREADS_REPORT_H_
#define JAX_EP_FFI_FABRIC_THREADS_REPORT_H_

#include <functional>
#include <string>

namespace jax_ep {

// Puts "jax_ep ", the text and a line's end on stderr, at once and in one piece. This
// is the only place of the library that prints. Errors go the way of the call that
// failed, but beside XLA's own collectives nobody may live to see them: those wait for
// the same ranks, and when their time is up XLA:CPU aborts the process. Never waits, so
// that it may be called with locks held: where nobody reads stderr, the line is left
// out.
void Report(const std::string& text);

// Puts a line that is no failure's on stderr, in the same way.
void PrintLine(const std::string& text);

// Takes the text of reports in place of stderr, one at a time; null stands for stderr.
// It must not call back.
using ReportSink = std::function<void(const std::string& text)>;

// For tests. Returns the sink until now.
ReportSink SetReportSink(ReportSink sink);

}  // namespace jax_ep

#endif  // JAX_EP_FFI_FABRIC_THREADS_REPORT_H_
