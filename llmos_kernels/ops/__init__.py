"""The ops: one file each, with formula, reference, schema, autograd and public function."""
