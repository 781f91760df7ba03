"""The first run on a GPU in one command: is it right, what does it cost, where does the time go.

    python -m bench.gpu [--steps device,oracle] [--minutes 9] [--case headline] [--method ours]
    python -m bench.gpu --rehearse      # all of it on a CPU at toy size, in Triton's interpreter, with faults

Each step is a process of its own with its own time limit (`supervise`); it works through items (`steps.Item`), and one that
hangs, dies or breaks the device costs the others nothing: the step goes on behind it in a new process. What is found is
appended to `rows.jsonl` as it is found. Needs torch, triton and what they bring; what else is missing is a row that says so.
"""
