"""Tools that every other folder uses: errors, options, files, devices, memory, processes and progress."""
