"""Where images come from: a folder by class, a table, and the data sets that `nearfar fetch` knows."""
