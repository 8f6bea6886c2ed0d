; Counters in a program's shared memory, for `sketch_triton.py`: Triton has no operation that adds to one there.
; LLVM links this into the kernel, and the assembler makes `count` one instruction (ATOMS.POPC.INC).

target triple = "nvptx64-nvidia-cuda"

@probes_counters = internal addrspace(3) global [4097 x i32] undef, align 16

define i32 @probes_clear(i32 %counter) alwaysinline nounwind {
  %place = getelementptr [4097 x i32], ptr addrspace(3) @probes_counters, i32 0, i32 %counter
  store i32 0, ptr addrspace(3) %place, align 4
  ret i32 %counter
}

define i32 @probes_count(i32 %counter) alwaysinline nounwind {
  %place = getelementptr [4097 x i32], ptr addrspace(3) @probes_counters, i32 0, i32 %counter
  %before = atomicrmw add ptr addrspace(3) %place, i32 1 monotonic
  ret i32 %counter
}

define i32 @probes_counted(i32 %counter) alwaysinline nounwind {
  %place = getelementptr [4097 x i32], ptr addrspace(3) @probes_counters, i32 0, i32 %counter
  %count = load i32, ptr addrspace(3) %place, align 4
  ret i32 %count
}
