// Conditional nodes of CUDA graphs, inserted into a stream while it is being captured: whoever captures it need not know.
#pragma once

#include <cstdint>
#include <vector>

namespace dynexec {

// Load the kernel that chooses: while a stream is captured nothing can be.
void prepare_conditional();

// All throw std::runtime_error with the name of the call and CUDA's message.

// Insert a node that runs one of `bodies` graphs, or none, by offset[1] - offset[0], int32 on the device: with `size` 0
// the only one where that is not 0 (an IF node), else number (count + size - 1) / size, at most the last one (SWITCH).
// `stream`, being captured, goes on behind the node. Gives the bodies, empty graphs that belong to the node.
std::vector<uint64_t> insert_conditional(uint64_t stream, uint64_t offset, int64_t size, uint32_t bodies);

// Capture what is launched on `stream`, which is not being captured, into such a body.
void begin_body(uint64_t stream, uint64_t body);
void end_body(uint64_t stream);

}  // namespace dynexec
