-- name: find_table -- Null where no migration ever ran.
select to_regclass('public.schema_migration');

-- name: find_elsewhere -- Another schema that holds this engine's record of migrations, or null.
select pg_namespace.nspname
from pg_class join pg_namespace on pg_namespace.oid = pg_class.relnamespace
where pg_class.relname = 'schema_migration' and pg_class.relkind = 'r'
    and pg_namespace.nspname <> 'public'
    and exists (
        select from pg_attribute where attrelid = pg_class.oid and attname = 'sha256'
    )
order by pg_namespace.nspname limit 1;

-- name: create_table -- The record of what ran; the only table that no migration makes.
create table if not exists schema_migration (
    name       text primary key,
    sha256     text not null check (sha256 ~ '^[0-9a-f]{64}$'),
    applied_at timestamptz not null default now()
);

-- name: recorded -- What this database ran.
select name, sha256 from schema_migration order by name;

-- name: record -- One migration ran.
insert into schema_migration (name, sha256) values ($1, $2);
