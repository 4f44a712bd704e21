"""Where other libraries take functions of ours. Each module imports its library, none is needed."""
